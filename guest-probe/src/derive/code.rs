//! Offsets in instructions: which bytes of the structure that an argument points to a function reads or writes.
//!
//! Instructions are read in a line from a function's first byte to its last, and the registers that hold the argument are followed through
//! moves and forward jumps; jumps back and through tables are not followed. So the set may hold a place too many or too few; a
//! witness that was misled names none, or one that memory does not bear out, and neither is believed.

use std::collections::HashMap;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use crate::elf::{Elf, ElfError, ReadAt, Symbol};

use super::Witness;
use super::names::contains;

/// Bytes of a function that are read at most: those that matter have under 2,000.
const MOST_BYTES: u64 = 4096;
/// Bytes where the linker does not say how long a function is.
const UNKNOWN_BYTES: u64 = 64;

/// One access to the structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    offset: usize,
    bytes: usize,
    writes: bool,
    /// The constant that is compared or stored.
    constant: Option<u64>,
}

/// What a function does.
#[derive(Clone, Debug, Default)]
struct Function {
    accesses: Vec<Access>,
    /// Accesses through a pointer in the structure, with that one's offset.
    through: Vec<(usize, Access)>,
    /// Factors of multiplications by a constant.
    factors: Vec<u64>,
}

/// The functions that are looked into, by their mangled beginning: the exported accessors first.
const FUNCTIONS: [&str; 14] = [
    "_ZNK10buf_page_t14is_io_fix_readEv",
    "_ZNK10buf_page_t15is_io_fix_writeEv",
    WAS_STALE,
    "_ZNK11buf_block_t14get_page_levelEv",
    "_ZNK11buf_block_t8is_emptyEv",
    "_ZNK11fil_space_t10is_deletedEv",
    "_ZNK11fil_space_t18get_recent_versionEv",
    "_Z19fil_space_set_flagsP11fil_space_t",
    "_Z27buf_flush_ready_for_replacePK10buf_page_t",
    "_Z16buf_flush_removeP10buf_page_t",
    "_Z32buf_LRU_block_free_non_file_pageP11buf_block_t",
    "_ZN10buf_pool_t12madvise_dumpEv",
    "_ZN10buf_pool_t17madvise_dont_dumpEv",
    IN_INSTANCE,
];

/// Looks through a pool's chunks for a block.
const IN_INSTANCE: &str = "_Z24buf_is_block_in_instancePK10buf_pool_tPK11buf_block_t";
/// Compares a block's tablespace, its id and its version.
const WAS_STALE: &str = "_ZNK10buf_page_t9was_staleEv";

/// All that the code tells.
pub(super) struct Evidence {
    functions: HashMap<&'static str, Function>,
}

impl Evidence {
    /// Reads the functions that the program has.
    pub fn read<F: ReadAt + ?Sized>(elf: &Elf<'_, F>) -> Result<Self, ElfError> {
        let found = elf.symbols_where(|name| {
            FUNCTIONS.iter().any(|wanted| name.starts_with(wanted.as_bytes())) && !contains(name, b".cold")
        })?;
        let mut functions = HashMap::new();
        for wanted in FUNCTIONS {
            let named: Vec<&Symbol> = found.iter().filter(|symbol| symbol.name.starts_with(wanted)).collect();
            // Of two that begin alike neither is believed.
            let [symbol] = named[..] else { continue };
            let bytes = if symbol.bytes == 0 { UNKNOWN_BYTES } else { symbol.bytes.min(MOST_BYTES) };
            let code = elf.bytes_at(&symbol.name, symbol.address, bytes)?;
            functions.insert(wanted, Function::read(&code, symbol.address));
        }
        Ok(Self { functions })
    }

    /// Places of `bytes` bytes that the functions access; `None` when the program has none of them. Of several functions, what all
    /// of them access.
    fn places(&self, functions: &[&str], wanted: impl Fn(&Access) -> bool) -> Option<Witness> {
        let mut places: Option<Vec<usize>> = None;
        let mut says = Vec::new();
        for name in functions {
            let Some((name, function)) = self.functions.get_key_value(name) else { continue };
            let own: Vec<usize> = function
                .accesses
                .iter()
                .filter(|access| wanted(access))
                .map(|access| access.offset)
                .collect();
            says.push(demangled(name));
            places = Some(match places {
                None => own,
                Some(before) => before.into_iter().filter(|place| own.contains(place)).collect(),
            });
        }
        Some(Witness::new(places?, format!("code of {}", says.join(" and "))))
    }

    /// `frame`: a block's page is reached through it.
    pub fn frame(&self) -> Option<Witness> {
        self.places(&["_ZNK11buf_block_t14get_page_levelEv", "_ZNK11buf_block_t8is_emptyEv"], |access| {
            access.bytes == 8 && !access.writes
        })
    }

    /// `io_fix`: one byte is compared with 1 for a read and with 2 for a write.
    pub fn io_fix(&self) -> Option<Witness> {
        let read = self.places(&["_ZNK10buf_page_t14is_io_fix_readEv"], |access| {
            access.bytes == 1 && access.constant == Some(u64::from(super::IO_FIX_READ))
        })?;
        let write = self.places(&["_ZNK10buf_page_t15is_io_fix_writeEv"], |access| {
            access.bytes == 1 && access.constant == Some(2)
        })?;
        let both = read.places.into_iter().filter(|place| write.places.contains(place)).collect();
        Some(Witness::new(both, format!("{} and {}", read.says, write.says.trim_start_matches("code of "))))
    }

    /// `fix_count`: a page that is to be replaced must have none.
    pub fn fix_count(&self) -> Option<Witness> {
        self.places(&["_Z27buf_flush_ready_for_replacePK10buf_page_t"], |access| {
            access.bytes == 4 && !access.writes
        })
    }

    /// `state`: one byte that is asked before a block is freed.
    pub fn state(&self) -> Option<Witness> {
        self.places(&["_Z32buf_LRU_block_free_non_file_pageP11buf_block_t"], |access| access.bytes == 1)
    }

    /// `oldest`: 8 bytes that become 0 when a page leaves the flush list.
    pub fn oldest(&self) -> Option<Witness> {
        self.places(&["_Z16buf_flush_removeP10buf_page_t"], |access| {
            access.bytes == 8 && access.writes && access.constant == Some(0)
        })
    }

    /// `space` of a block.
    pub fn space(&self) -> Option<Witness> {
        self.places(&[WAS_STALE], |access| access.bytes == 8)
    }

    /// `version` of a block, or its page id: was_stale reads both.
    pub fn version(&self) -> Option<Witness> {
        self.places(&[WAS_STALE], |access| access.bytes == 4)
    }

    /// `version` of a tablespace.
    pub fn space_version(&self) -> Option<Witness> {
        self.places(&["_ZNK11fil_space_t18get_recent_versionEv"], |access| access.bytes == 4)
    }

    /// `deleted` of a tablespace.
    pub fn deleted(&self) -> Option<Witness> {
        self.places(&["_ZNK11fil_space_t10is_deletedEv"], |access| access.bytes == 1)
    }

    /// `flags` of a tablespace.
    pub fn flags(&self) -> Option<Witness> {
        self.places(&["_Z19fil_space_set_flagsP11fil_space_t"], |access| access.bytes == 4 && access.writes)
    }

    /// The number of chunks and the pointer to them.
    pub fn chunks(&self) -> Option<Witness> {
        self.places(&["_ZN10buf_pool_t12madvise_dumpEv", "_ZN10buf_pool_t17madvise_dont_dumpEv"], |access| {
            access.bytes == 8 && !access.writes
        })
    }

    /// Places that a function reads through a pointer at `at` of its argument.
    fn places_through(&self, name: &str, at: usize, bytes: usize) -> Option<Witness> {
        let function = self.functions.get(name)?;
        let found =
            function.through.iter().filter(|(through, access)| *through == at && access.bytes == bytes);
        let places = found.map(|(_, access)| access.offset).collect();
        Some(Witness::new(places, format!("code of {}", demangled(name))))
    }

    /// Fields of a chunk, which is reached through the pool's pointer at `chunks`.
    pub fn chunk(&self, chunks: usize) -> Option<Witness> {
        self.places_through(IN_INSTANCE, chunks, 8)
    }

    /// `id` of a tablespace, which is reached through the block's pointer at `space`.
    pub fn space_id(&self, space: usize) -> Option<Witness> {
        self.places_through(WAS_STALE, space, 4)
    }

    /// Bytes in a control block: the number of blocks in a chunk is multiplied by it.
    pub fn block_size(&self) -> Option<Witness> {
        let function = self.functions.get(IN_INSTANCE)?;
        let factors = function.factors.iter().filter_map(|factor| usize::try_from(*factor).ok()).collect();
        Some(Witness::new(factors, format!("factor in the code of {}", demangled(IN_INSTANCE))))
    }

    /// Bytes in a pool instance: the number of a block's instance is multiplied by it.
    pub fn pool_size(&self) -> Option<Witness> {
        let names =
            ["_Z16buf_flush_removeP10buf_page_t", "_Z32buf_LRU_block_free_non_file_pageP11buf_block_t"];
        let mut factors: Option<Vec<usize>> = None;
        for name in names {
            let Some(function) = self.functions.get(name) else { continue };
            let own: Vec<usize> =
                function.factors.iter().filter_map(|factor| usize::try_from(*factor).ok()).collect();
            factors = Some(match factors {
                None => own,
                Some(before) => before.into_iter().filter(|factor| own.contains(factor)).collect(),
            });
        }
        Some(Witness::new(
            factors?,
            "factor in the code of buf_flush_remove and buf_LRU_block_free_non_file_page",
        ))
    }
}

fn demangled(name: &str) -> String {
    let symbol = cpp_demangle::Symbol::new(name).ok().and_then(|symbol| symbol.demangle().ok());
    let demangled = symbol.unwrap_or_else(|| name.to_owned());
    demangled.split('(').next().unwrap_or(name).to_owned()
}

impl Function {
    /// What a function does with the structure that its first argument points to.
    fn read(code: &[u8], address: u64) -> Self {
        let mut function = Self::default();
        let mut factory = InstructionInfoFactory::new();
        let mut holders = Holders::from([(Register::RDI, Holds::Argument)]);
        // What registers hold where a jump leads, and whether the instruction before goes on to this one.
        let mut at_targets: HashMap<u64, Holders> = HashMap::new();
        let mut goes_on = true;
        let mut instruction = Instruction::default();
        let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                break;
            }
            match at_targets.remove(&instruction.ip()) {
                Some(saved) if goes_on => holders.retain(|holder, holds| saved.get(holder) == Some(holds)),
                Some(saved) => holders = saved,
                None if goes_on => {}
                // Padding, or what only a jump back or through a table leads to.
                None => continue,
            }
            let info = factory.info(&instruction);
            let mut loads = None;
            for memory in info.used_memory() {
                let (Some(through), true) =
                    (holders.get(&memory.base()).copied(), memory.index() == Register::None)
                else {
                    continue;
                };
                let Ok(offset) = usize::try_from(memory.displacement()) else { continue };
                // `lea` computes an address and reads nothing.
                if memory.access() == OpAccess::NoMemAccess {
                    continue;
                }
                let access = Access {
                    offset,
                    bytes: memory.memory_size().size(),
                    writes: writes(memory.access()),
                    constant: constant(&instruction),
                };
                match through {
                    Holds::Argument => {
                        function.accesses.push(access);
                        loads =
                            (instruction.mnemonic() == Mnemonic::Mov && access.bytes == 8 && !access.writes)
                                .then_some(Holds::Pointer(offset));
                    }
                    Holds::Pointer(at) => function.through.push((at, access)),
                }
            }
            if instruction.mnemonic() == Mnemonic::Imul
                && let (3, Some(factor)) = (instruction.op_count(), constant(&instruction))
            {
                function.factors.push(factor);
            }
            follow(&instruction, loads, &mut holders, info.used_registers());
            let flow = instruction.flow_control();
            if matches!(flow, FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch) {
                let saved =
                    at_targets.entry(instruction.near_branch_target()).or_insert_with(|| holders.clone());
                saved.retain(|holder, holds| holders.get(holder) == Some(holds));
            }
            goes_on = matches!(
                flow,
                FlowControl::Next
                    | FlowControl::ConditionalBranch
                    | FlowControl::Call
                    | FlowControl::IndirectCall
            );
        }
        function
    }
}

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// The function's first argument.
    Argument,
    /// What lies at an offset of what the argument points to.
    Pointer(usize),
}

/// The registers that hold something of interest.
type Holders = HashMap<Register, Holds>;

/// Keeps them, after an instruction that loads something or not.
fn follow(
    instruction: &Instruction,
    loads: Option<Holds>,
    holders: &mut Holders,
    used: &[iced_x86::UsedRegister],
) {
    let is_copy = instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_kind() == OpKind::Register
        && instruction.op1_kind() == OpKind::Register;
    let copied = is_copy.then(|| holders.get(&instruction.op1_register()).copied()).flatten();
    // What is written holds something else from now on, but what is moved on by a constant points to the next of its kind.
    let steps = instruction.mnemonic() == Mnemonic::Add && constant(instruction).is_some();
    for register in used.iter().filter(|register| writes(register.access()) && !steps) {
        holders.remove(&register.register().full_register());
    }
    if let (Some(holds), OpKind::Register) = (copied.or(loads), instruction.op0_kind()) {
        holders.insert(instruction.op0_register(), holds);
    }
    if instruction.mnemonic() == Mnemonic::Call {
        // The callee may write these.
        const SCRATCH: [Register; 9] = [
            Register::RAX,
            Register::RCX,
            Register::RDX,
            Register::RSI,
            Register::RDI,
            Register::R8,
            Register::R9,
            Register::R10,
            Register::R11,
        ];
        holders.retain(|holder, _| !SCRATCH.contains(holder));
    }
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite)
}

/// The constant of an instruction, if it has one.
fn constant(instruction: &Instruction) -> Option<u64> {
    (0..instruction.op_count()).find_map(|operand| match instruction.try_op_kind(operand) {
        Ok(
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64,
        ) => instruction.try_immediate(operand).ok(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn access(offset: usize, bytes: usize, writes: bool, constant: Option<u64>) -> Access {
        Access { offset, bytes, writes, constant }
    }

    #[test]
    fn a_byte_that_is_compared_is_seen() {
        // endbr64; cmpb $1, 0x14(%rdi); sete %al; ret
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0x80, 0x7f, 0x14, 0x01, 0x0f, 0x94, 0xc0, 0xc3];
        assert_eq!(Function::read(&code, 0x1000).accesses, [access(0x14, 1, false, Some(1))]);
    }

    #[test]
    fn the_argument_is_followed_until_it_is_lost() {
        let code = [
            0x49, 0x89, 0xfc, // mov %rdi, %r12
            0x31, 0xff, // xor %edi, %edi
            0x8b, 0x47, 0x10, // mov 0x10(%rdi), %eax: no longer the argument
            0xe8, 0x00, 0x00, 0x00, 0x00, // call
            0x49, 0xc7, 0x44, 0x24, 0x38, 0x00, 0x00, 0x00, 0x00, // movq $0, 0x38(%r12)
            0x4c, 0x8d, 0x6b, 0x20, // lea 0x20(%rbx), %r13
            0x48, 0x69, 0xdb, 0x48, 0x25, 0x00, 0x00, // imul $0x2548, %rbx, %rbx
        ];
        let function = Function::read(&code, 0x1000);
        assert!(function.through.is_empty());
        assert_eq!(function.accesses, [access(0x38, 8, true, Some(0))]);
        assert_eq!(function.factors, [0x2548]);
    }

    #[test]
    fn a_jump_takes_along_what_registers_hold() {
        let code = [
            0x48, 0x89, 0xfb, // mov %rdi, %rbx
            0x74, 0x06, // je +6
            0x5b, // pop %rbx
            0x8b, 0x03, // mov (%rbx), %eax: no longer the argument
            0xc3, // ret
            0x66, 0x90, // padding
            0x8b, 0x43, 0x10, // mov 0x10(%rbx), %eax
            0xc3, // ret
            0x8b, 0x43, 0x20, // nothing leads here
        ];
        assert_eq!(Function::read(&code, 0x1000).accesses, [access(0x10, 4, false, None)]);
    }

    #[test]
    fn a_pointer_in_the_structure_is_followed() {
        let code = [
            0x48, 0x8b, 0x97, 0x78, 0x01, 0x00, 0x00, // mov 0x178(%rdi), %rdx
            0x48, 0x8b, 0x42, 0x10, // mov 0x10(%rdx), %rax
            0x48, 0x83, 0xc2, 0x18, // add $0x18, %rdx
            0x48, 0x69, 0x3a, 0x70, 0x01, 0x00, 0x00, // imul $0x170, (%rdx), %rdi
        ];
        let function = Function::read(&code, 0x1000);
        assert_eq!(function.accesses, [access(0x178, 8, false, None)]);
        let through: Vec<(usize, usize)> =
            function.through.iter().map(|(at, access)| (*at, access.offset)).collect();
        assert_eq!(through, [(0x178, 0x10), (0x178, 0)]);
        assert_eq!(function.factors, [0x170]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(code in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Function::read(&code, 0x1000);
        }
    }
}
