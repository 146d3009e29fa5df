//! Whether an object may go into a kernel.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::step::run;

/// Most that the object may have, so that it stays fit for the tree.
const MOST_BYTES: u64 = 150 * 1024;

/// Symbols that the object may leave to the kernel; `shim_*` is ours.
const FROM_KERNEL: &[&str] = &["memcpy", "memmove", "memset", "memcmp", "mmput", "get_random_u64"];

/// Checks that the object uses no vector or floating-point register (the kernel does not save them), makes no indirect branch and
/// no return but through the kernel's thunks (or its mitigations would be void), and leaves no symbol undefined that neither the
/// shim nor every kernel has.
///
/// # Errors
/// The first instruction or symbol that must not be.
pub(super) fn inspect(object: &Path) -> Result<()> {
    let bytes = std::fs::metadata(object)?.len();
    if bytes > MOST_BYTES {
        bail!("{} has {bytes} bytes, at most {MOST_BYTES} are wanted", object.display());
    }
    let code = run(Command::new("objdump").args(["-d", "--no-show-raw-insn", "-M", "att"]).arg(object))?;
    let code = String::from_utf8_lossy(&code);
    if !code.lines().any(|line| instruction(line).is_some_and(|text| text.starts_with("endbr64"))) {
        bail!("{} has no code that a kernel may call", object.display());
    }
    if let Some(line) = code.lines().find(|line| instruction(line).is_some_and(is_unfit)) {
        bail!("{} has an instruction that must not be in a kernel: {}", object.display(), line.trim());
    }
    let undefined = run(Command::new("nm").arg("-u").arg(object))?;
    let undefined = String::from_utf8_lossy(&undefined);
    let known = |symbol: &str| {
        symbol.starts_with("shim_") || symbol.starts_with("__x86_") || FROM_KERNEL.contains(&symbol)
    };
    let names = undefined.lines().filter_map(|line| line.split_whitespace().last());
    if let Some(symbol) = names.into_iter().find(|symbol| !known(symbol)) {
        bail!("{} needs {symbol}, which neither the shim nor every kernel has", object.display());
    }
    Ok(())
}

/// The instruction of a line of `objdump -d`: what stands behind `ADDRESS:`.
fn instruction(line: &str) -> Option<&str> {
    let (address, text) = line.split_once(":\t")?;
    let address = address.trim_start();
    (!address.is_empty() && address.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| text.trim())
}

fn is_unfit(text: &str) -> bool {
    let mut words = text.split_whitespace().filter(|word| !["notrack", "bnd", "rep", "repz"].contains(word));
    let mnemonic = words.next().unwrap_or_default();
    let vector = ["%xmm", "%ymm", "%zmm", "%mm", "%st"].iter().any(|register| text.contains(register));
    let indirect = (mnemonic.starts_with("call") || mnemonic.starts_with("jmp")) && text.contains('*');
    let bare_return = mnemonic.starts_with("ret");
    vector || indirect || bare_return
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_registers_indirect_branches_and_bare_returns_are_unfit() {
        for text in [
            "movups %xmm0,(%rdi)",
            "movq   %mm0,%rax",
            "fld    %st(0)",
            "call   *%rax",
            "jmp    *0x8(%rdi)",
            "ret",
            "retq",
            "notrack jmp *%rax",
        ] {
            assert!(is_unfit(text), "{text}");
        }
        for text in ["mov    %rax,(%rdi)", "call   12 <memcpy>", "jmp    0 <__x86_return_thunk>", "endbr64"] {
            assert!(!is_unfit(text), "{text}");
        }
    }

    #[test]
    fn an_instruction_stands_behind_its_address() {
        assert_eq!(instruction("  1f:\tendbr64"), Some("endbr64"));
        assert_eq!(instruction("0000000000000000 <poolskip_start>:"), None);
        assert_eq!(instruction("file:\tendbr64"), None);
    }
}
