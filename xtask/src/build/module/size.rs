//! How much of the module is C, and how big the core is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{OBJECT, Sources, workspace};

/// Most lines that `shim.c` may have in all, and most lines of code that all C may have.
const MOST_LINES_OF_C: usize = 250;

/// Prints the object's size, and the lines of C against those of Rust, neither blank nor comment, without tests.
///
/// # Errors
/// When there is more C than there may be.
pub(super) fn check() -> Result<()> {
    let sources = Sources::new();
    let shim = sources.kernel.join("shim.c");
    let whole = read(&shim)?.lines().count();
    let c = count(&[shim.clone(), sources.kernel.join("walk.c"), sources.kernel.join("shim.h")])?;
    if whole.max(c) > MOST_LINES_OF_C {
        bail!("{} has {whole} lines, the shim {c} of code in all: at most {MOST_LINES_OF_C}", shim.display());
    }
    let is_rust = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "rs");
    let rust: Vec<PathBuf> = sources.files()?.into_iter().filter(is_rust).collect();
    let object = fs::metadata(workspace().join(OBJECT)).with_context(|| format!("no {OBJECT}"))?.len();
    eprintln!(
        "  kernel module: core {object} bytes of object; {c} lines of C, {} lines of Rust",
        count(&rust)?
    );
    Ok(())
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

fn count(files: &[PathBuf]) -> Result<usize> {
    files.iter().map(|file| Ok(lines_of_code(&read(file)?))).sum()
}

/// Lines that are neither blank nor nothing but comment.
fn lines_of_code(text: &str) -> usize {
    let mut in_comment = false;
    let mut lines = 0;
    for line in text.lines().map(str::trim) {
        if in_comment || line.starts_with("/*") {
            in_comment = !line.contains("*/");
        } else if !line.is_empty() && !line.starts_with("//") {
            lines += 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_blank_lines_are_no_code() {
        let text = "/* one */\n/*\n * two\n */\nint a;\t/* behind code */\n\n// three\n  /// four\nint b;\n";
        assert_eq!(lines_of_code(text), 2);
    }

    #[test]
    fn the_shim_in_the_tree_is_thin() {
        check().unwrap();
    }
}
