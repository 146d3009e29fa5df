//! What is taken from mysqld's ELF file: its build id, where a symbol lies in the file and in memory, and where to put a probe.
//!
//! Only the parts that are needed are read: the file of a server is 80 MB, and the probe's own memory is bounded.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use goblin::container::{Container, Ctx, Endian};
use goblin::elf::header::{ELFCLASS64, ELFDATA2LSB, EM_X86_64, Header as AnyHeader};
use goblin::elf::program_header::{PF_X, PT_GNU_EH_FRAME, PT_LOAD, PT_NOTE, ProgramHeader};
use goblin::elf::section_header::{SHT_DYNSYM, SHT_SYMTAB, SectionHeader};
use thiserror::Error;

use crate::bytes::{u32_le, u64_le};

/// No table in the file may be larger than this.
const LARGEST_TABLE: u64 = 64 << 20;
/// No more symbols than these are found by a pattern: a mangled name can be long.
const MOST_FOUND: usize = 4096;
/// No name is longer: the longest in Debian's mysqld has about 3,000 bytes. A file without any NUL would be searched through for each.
const LONGEST_NAME: usize = 16 << 10;
/// Bytes that are looked at to place a probe.
const ENTRY_BYTES: usize = 6;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const SECTION_HEADER_BYTES: usize = 64;
const SYMBOL_BYTES: usize = 24;
/// Type of the note that holds the build id.
const NT_GNU_BUILD_ID: u32 = 3;

/// Bytes of a file by offset.
pub trait ReadAt {
    /// Reads as many bytes as there is room for.
    ///
    /// # Errors
    /// When they cannot be read, or the file ends before.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        let range = end.and_then(|end| self.get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
        buffer.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Why a file does not tell what is wanted.
#[derive(Debug, Error)]
pub enum ElfError {
    /// It cannot be read.
    #[error("cannot read {bytes} bytes at {offset:#x} of the ELF file: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// goblin refuses it.
    #[error("not a sound ELF file: {0}")]
    Parse(#[from] goblin::error::Error),
    /// It is for another machine.
    #[error("an ELF file of class {class}, byte order {order}, machine {machine}: guest-probe is for x86-64")]
    Foreign {
        /// ELF class.
        class: u8,
        /// Byte order.
        order: u8,
        /// Machine.
        machine: u16,
    },
    /// A table is larger than [`LARGEST_TABLE`].
    #[error("the ELF file has a table of {bytes} bytes: that is no mysqld")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// It has none.
    #[error("the ELF file has no build id: it cannot be told which mysqld it is")]
    NoBuildId,
    /// It has no such symbol.
    #[error("the ELF file has no symbol {symbol}")]
    NoSymbol {
        /// The symbol.
        symbol: String,
    },
    /// A symbol points outside the file.
    #[error("symbol {symbol} at {address:#x} lies in no loaded part of the file")]
    NotInFile {
        /// The symbol.
        symbol: String,
        /// Its address.
        address: u64,
    },
}

/// A symbol's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its address, relative to the load address.
    pub address: u64,
}

/// A defined symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name, as the linker has it.
    pub name: String,
    /// Its address, relative to the load address.
    pub address: u64,
    /// Bytes, as far as the linker knows.
    pub bytes: u64,
}

/// A part of the file that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its address, relative to the load address.
    pub address: u64,
    /// Bytes of it in the file.
    pub bytes: u64,
    /// Whether it is code.
    pub executable: bool,
}

/// Where a probe goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePlace {
    /// Offset in the file.
    pub file_offset: u64,
    /// Its address, relative to the load address.
    pub address: u64,
    /// Whether the instruction there is one that the kernel emulates: about 0.8 us a call, where any other costs 10 us.
    pub emulated: bool,
}

/// An ELF file's headers, with the tables read on demand.
pub struct Elf<'f, F: ReadAt + ?Sized> {
    file: &'f F,
    segments: Vec<ProgramHeader>,
    sections: Vec<SectionHeader>,
}

impl<'f, F: ReadAt + ?Sized> Elf<'f, F> {
    /// Reads the headers.
    ///
    /// # Errors
    /// When it is not a sound ELF file for this machine.
    pub fn parse(file: &'f F) -> Result<Self, ElfError> {
        let header_bytes = read(file, 0, HEADER_BYTES as u64)?;
        let header = header_bytes
            .first_chunk::<HEADER_BYTES>()
            .map(|bytes| goblin::elf64::header::Header::parse(bytes).map(AnyHeader::from))
            .ok_or(ElfError::NoBuildId)??;
        let (class, order) = (header.e_ident[4], header.e_ident[5]);
        if class != ELFCLASS64 || order != ELFDATA2LSB || header.e_machine != EM_X86_64 {
            return Err(ElfError::Foreign { class, order, machine: header.e_machine });
        }
        let context = Ctx::new(Container::Big, Endian::Little);
        let count = usize::from(header.e_phnum);
        let bytes = read(file, header.e_phoff, (count * PROGRAM_HEADER_BYTES) as u64)?;
        let segments = ProgramHeader::parse(&bytes, 0, count, context)?;
        let count = usize::from(header.e_shnum);
        // goblin takes offset 0 for "no table", so one header's room stands before it.
        let mut bytes = vec![0; SECTION_HEADER_BYTES];
        bytes.extend(read(file, header.e_shoff, (count * SECTION_HEADER_BYTES) as u64)?);
        let sections = SectionHeader::parse(&bytes, SECTION_HEADER_BYTES, count, context)?;
        Ok(Self { file, segments, sections })
    }

    /// The build id, in hexadecimal.
    ///
    /// # Errors
    /// [`ElfError::NoBuildId`] or a failed read.
    pub fn build_id(&self) -> Result<String, ElfError> {
        for segment in self.segments.iter().filter(|segment| segment.p_type == PT_NOTE) {
            let notes = read(self.file, segment.p_offset, segment.p_filesz)?;
            if let Some(id) = find_build_id(&notes, segment.p_align) {
                return Ok(id.iter().map(|byte| format!("{byte:02x}")).collect());
            }
        }
        Err(ElfError::NoBuildId)
    }

    /// Address of the first byte of the file, relative to the load address: 0 for anything built to be loaded anywhere.
    pub fn first_address(&self) -> u64 {
        let loaded = self.segments.iter().filter(|segment| segment.p_type == PT_LOAD);
        loaded.map(|segment| segment.p_vaddr.wrapping_sub(segment.p_offset)).min().unwrap_or(0)
    }

    /// Finds symbols by name, all in one pass over the dynamic symbols; where one is missing there, over all symbols, which only a
    /// file that was not stripped has.
    ///
    /// # Errors
    /// [`ElfError::NoSymbol`] for the first that is missing, or a failed read.
    pub fn symbols(&self, names: &[&str]) -> Result<Vec<Place>, ElfError> {
        let mut found: HashMap<&str, u64> = HashMap::new();
        for kind in [SHT_DYNSYM, SHT_SYMTAB] {
            self.each_symbol(kind, |name, address, _| {
                let wanted = names.iter().find(|wanted| wanted.as_bytes() == name);
                if let Some(wanted) = wanted {
                    found.insert(wanted, address);
                }
            })?;
            if found.len() >= names.len() {
                break;
            }
        }
        names
            .iter()
            .map(|name| {
                let address = found.get(name).copied();
                Ok(Place {
                    address: address.ok_or_else(|| ElfError::NoSymbol { symbol: (*name).to_owned() })?,
                })
            })
            .collect()
    }

    /// The defined symbols that are wanted; of those of one name, one. Dynamic ones, and where there is none of them, others.
    ///
    /// # Errors
    /// A failed read.
    pub fn symbols_where(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Symbol>, ElfError> {
        let mut found: Vec<Symbol> = Vec::new();
        for kind in [SHT_DYNSYM, SHT_SYMTAB] {
            self.each_symbol(kind, |name, address, bytes| {
                if wanted(name)
                    && found.len() < MOST_FOUND
                    && let Ok(name) = std::str::from_utf8(name)
                {
                    found.push(Symbol { name: name.to_owned(), address, bytes });
                }
            })?;
            if !found.is_empty() {
                break;
            }
        }
        found.sort_by(|left, right| (&left.name, left.address).cmp(&(&right.name, right.address)));
        found.dedup_by(|left, right| left.name == right.name);
        Ok(found)
    }

    /// How many symbols of either kind it has: dynamic ones, and all.
    ///
    /// # Errors
    /// A failed read.
    pub fn symbol_counts(&self) -> Result<(u64, u64), ElfError> {
        let (mut dynamic, mut all) = (0, 0);
        self.each_symbol(SHT_DYNSYM, |_, _, _| dynamic += 1)?;
        self.each_symbol(SHT_SYMTAB, |_, _, _| all += 1)?;
        Ok((dynamic, all))
    }

    /// Hands out name, address and size of each defined symbol in the tables of one kind.
    fn each_symbol(&self, kind: u32, mut each: impl FnMut(&[u8], u64, u64)) -> Result<(), ElfError> {
        for section in self.sections.iter().filter(|section| section.sh_type == kind) {
            let Some(strings) = self.sections.get(section.sh_link as usize) else { continue };
            let strings = read(self.file, strings.sh_offset, strings.sh_size)?;
            let symbols = read(self.file, section.sh_offset, section.sh_size)?;
            for symbol in symbols.chunks_exact(SYMBOL_BYTES) {
                let fields = (u32_le(symbol, 0), u64_le(symbol, 8), u64_le(symbol, 16));
                let (Some(name), Some(address), Some(bytes)) = fields else { continue };
                let rest = strings.get(name as usize..).unwrap_or_default();
                let rest = rest.get(..LONGEST_NAME).unwrap_or(rest);
                if let (Some(end), true) = (rest.iter().position(|byte| *byte == 0), address != 0) {
                    each(&rest[..end], address, bytes);
                }
            }
        }
        Ok(())
    }

    /// The parts that are loaded from the file.
    pub fn loaded_parts(&self) -> impl Iterator<Item = Part> + '_ {
        self.segments.iter().filter(|segment| segment.p_type == PT_LOAD).map(|segment| Part {
            address: segment.p_vaddr,
            bytes: segment.p_filesz,
            executable: segment.p_flags & PF_X != 0,
        })
    }

    /// Address and size of the index of the exception tables, `.eh_frame_hdr`.
    pub fn exception_index(&self) -> Option<(u64, u64)> {
        let segment = self.segments.iter().find(|segment| segment.p_type == PT_GNU_EH_FRAME)?;
        Some((segment.p_vaddr, segment.p_filesz))
    }

    /// Some bytes of a loaded part of the file, by address; fewer where that part ends.
    ///
    /// # Errors
    /// [`ElfError::NotInFile`] or a failed read.
    pub fn bytes_at(&self, symbol: &str, address: u64, most: u64) -> Result<Vec<u8>, ElfError> {
        let (file_offset, left) = self.locate(symbol, address)?;
        read(self.file, file_offset, left.min(most))
    }

    /// Where an address lies in the file, and how many bytes of its part follow.
    fn locate(&self, symbol: &str, address: u64) -> Result<(u64, u64), ElfError> {
        let loaded = self.segments.iter().filter(|segment| segment.p_type == PT_LOAD);
        loaded
            .filter_map(|segment| {
                let into = address.checked_sub(segment.p_vaddr)?;
                let left = segment.p_filesz.checked_sub(into).filter(|left| *left > 0)?;
                Some((segment.p_offset.checked_add(into)?, left))
            })
            .next()
            .ok_or_else(|| ElfError::NotInFile { symbol: symbol.to_owned(), address })
    }

    /// Where to probe a function: at the `push` that begins it, behind the `endbr64` where there is one, for the kernel emulates a
    /// `push` and single-steps nearly everything else. All arguments and the return address are still in place there. At
    /// the function's first byte when it does not begin so.
    ///
    /// # Errors
    /// [`ElfError::NotInFile`] or a failed read.
    pub fn probe_place(&self, symbol: &str, place: Place) -> Result<ProbePlace, ElfError> {
        let bytes = self.bytes_at(symbol, place.address, ENTRY_BYTES as u64)?;
        let (file_offset, _) = self.locate(symbol, place.address)?;
        let (skip, emulated) = push_at(&bytes).map_or((0, false), |skip| (skip, true));
        Ok(ProbePlace {
            file_offset: file_offset + skip,
            address: place.address.wrapping_add(skip),
            emulated,
        })
    }
}

/// Offset of the `push` of a register that these bytes begin with, behind `endbr64` or at once.
fn push_at(bytes: &[u8]) -> Option<u64> {
    const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    let (skip, rest) = match bytes.strip_prefix(&ENDBR64) {
        Some(rest) => (ENDBR64.len() as u64, rest),
        None => (0, bytes),
    };
    matches!(rest, [0x50..=0x57, ..] | [0x41, 0x50..=0x57, ..]).then_some(skip)
}

/// The GNU build id among ELF notes.
fn find_build_id(mut notes: &[u8], alignment: u64) -> Option<&[u8]> {
    let alignment = if alignment == 8 { 8 } else { 4 };
    loop {
        let name_size = u32_le(notes, 0)? as usize;
        let id_size = u32_le(notes, 4)? as usize;
        let kind = u32_le(notes, 8)?;
        let rest = notes.get(12..)?;
        let name = rest.get(..name_size)?;
        let id_at = 12_usize.checked_add(name_size)?.checked_next_multiple_of(alignment)?;
        let id = notes.get(id_at..id_at.checked_add(id_size)?)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" && !id.is_empty() {
            return Some(id);
        }
        notes = notes.get(id_at.checked_add(id_size)?.checked_next_multiple_of(alignment)?..)?;
    }
}

fn read<F: ReadAt + ?Sized>(file: &F, offset: u64, bytes: u64) -> Result<Vec<u8>, ElfError> {
    if bytes > LARGEST_TABLE {
        return Err(ElfError::TooLarge { bytes });
    }
    let mut buffer = vec![0; bytes as usize];
    file.read_exact_at(&mut buffer, offset).map_err(|source| ElfError::Read { offset, bytes, source })?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    /// Where things lie in [`SMALL`].
    const NOTE_AT: u64 = 0x100;
    const STRINGS_AT: u64 = 0x140;
    const SYMBOLS_AT: u64 = 0x180;
    const SECTIONS_AT: u64 = 0x200;
    const CODE_AT: u64 = 0x300;
    /// Its segment is loaded this far behind its place in the file.
    const LOADED_BEHIND: u64 = 0x1000;

    /// A small ELF file with a build id, two symbols and their code.
    static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut file = vec![0_u8; 0x340];
        let mut put =
            |at: u64, bytes: &[u8]| file[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', ELFCLASS64, ELFDATA2LSB, 1]);
        put(16, &3_u16.to_le_bytes());
        put(18, &EM_X86_64.to_le_bytes());
        put(20, &1_u32.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(40, &SECTIONS_AT.to_le_bytes());
        for (at, value) in [(52, 64_u16), (54, 56), (56, 2), (58, 64), (60, 3), (62, 0)] {
            put(at, &value.to_le_bytes());
        }
        // Segments: all of it loaded, and the note.
        for (at, kind, offset, size, behind) in
            [(64, PT_LOAD, 0, 0x340, LOADED_BEHIND), (120, PT_NOTE, NOTE_AT, 18, 0)]
        {
            put(at, &kind.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 16, &(offset + behind).to_le_bytes());
            put(at + 32, &u64::to_le_bytes(size));
            put(at + 40, &u64::to_le_bytes(size));
            put(at + 48, &4_u64.to_le_bytes());
        }
        put(NOTE_AT, &[4, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, b'G', b'N', b'U', 0, 0xab, 0xcd]);
        put(STRINGS_AT, b"\0first\0first_and_more\0");
        for (index, name, address) in [(1, 1_u32, 0x300_u64), (2, 7, 0x310)] {
            let at = SYMBOLS_AT + index * SYMBOL_BYTES as u64;
            put(at, &name.to_le_bytes());
            put(at + 8, &(address + LOADED_BEHIND).to_le_bytes());
        }
        // Sections: none, .dynsym, .dynstr.
        for (index, kind, offset, size, link) in
            [(1, SHT_DYNSYM, SYMBOLS_AT, 3 * SYMBOL_BYTES as u64, 2_u32), (2, 3, STRINGS_AT, 23, 0)]
        {
            let at = SECTIONS_AT + index * SECTION_HEADER_BYTES as u64;
            put(at + 4, &kind.to_le_bytes());
            put(at + 24, &offset.to_le_bytes());
            put(at + 32, &size.to_le_bytes());
            put(at + 40, &link.to_le_bytes());
        }
        put(CODE_AT, &[0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48]);
        put(CODE_AT + 0x10, &[0x48, 0x83, 0xec, 0x08]);
        file
    });

    #[test]
    fn a_small_file_is_read() {
        let elf = Elf::parse(SMALL.as_slice()).unwrap();
        assert_eq!(elf.build_id().unwrap(), "abcd");
        assert_eq!(elf.first_address(), LOADED_BEHIND);
        let places = elf.symbols(&["first_and_more", "first"]).unwrap();
        assert_eq!(places, [Place { address: 0x1310 }, Place { address: 0x1300 }]);
        let first = elf.probe_place("first", places[1]).unwrap();
        assert_eq!(first, ProbePlace { file_offset: 0x304, address: 0x1304, emulated: true });
        let more = elf.probe_place("first_and_more", places[0]).unwrap();
        assert_eq!(more, ProbePlace { file_offset: 0x310, address: 0x1310, emulated: false });
        assert!(matches!(elf.symbols(&["firs"]), Err(ElfError::NoSymbol { symbol }) if symbol == "firs"));
        let outside = Place { address: 0x300 };
        assert!(matches!(elf.probe_place("first", outside), Err(ElfError::NotInFile { .. })));
    }

    #[test]
    fn this_very_program_is_read() {
        let file = File::open("/proc/self/exe").unwrap();
        let elf = Elf::parse(&file).unwrap();
        assert!(elf.build_id().is_ok_and(|id| id.len() >= 16), "Rust's linker gives a build id");
        assert!(matches!(elf.symbols(&["no such symbol"]), Err(ElfError::NoSymbol { .. })));
    }

    #[test]
    fn another_machine_s_file_is_refused() {
        let mut file = SMALL.clone();
        file[18] = 0xb7;
        assert!(matches!(Elf::parse(file.as_slice()), Err(ElfError::Foreign { machine: 0xb7, .. })));
    }

    #[test]
    fn a_probe_goes_to_a_push() {
        assert_eq!(push_at(&[0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48]), Some(4));
        assert_eq!(push_at(&[0x55]), Some(0));
        assert_eq!(push_at(&[0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0x57]), Some(4));
        assert_eq!(push_at(&[0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0x83]), None);
        assert_eq!(push_at(&[]), None);
    }

    #[test]
    fn a_note_without_end_is_no_build_id() {
        let endless = [4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 3, 0, 0, 0, b'G', b'N', b'U', 0];
        assert_eq!(find_build_id(&endless, 4), None);
    }

    proptest! {
        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(Elf::parse(bytes.as_slice()).is_err());
        }

        #[test]
        fn a_damaged_file_does_no_harm(
            damage in prop::collection::vec((0_usize..0x300, any::<u8>()), 1..8),
            length in 0_usize..=0x340,
        ) {
            let mut file = SMALL.clone();
            for (at, value) in damage {
                file[at] = value;
            }
            file.truncate(length.max(0x2c0));
            if let Ok(elf) = Elf::parse(file.as_slice()) {
                let _ = elf.build_id();
                let _ = elf.first_address();
                for place in elf.symbols(&["first", "first_and_more"]).unwrap_or_default() {
                    let _ = elf.probe_place("first", place);
                }
            }
        }

        #[test]
        fn any_note_is_searched(bytes in prop::collection::vec(any::<u8>(), 0..100), alignment in any::<u64>()) {
            let _ = find_build_id(&bytes, alignment);
        }
    }
}
