//! A function by a text that only it uses, where names are hidden: MariaDB exports none of InnoDB's functions, but the one that completes
//! the read of a page complains of a page that says another id than was asked for.
//!
//! The text is found among the constants, the one instruction that refers to it among the code, and the function around that in the index
//! of the exception tables (`.eh_frame_hdr`, Linux Standard Base), which every program has, stripped or not.

use serde::Serialize;

use crate::bytes::u32_le;
use crate::elf::{Elf, ElfError, Place, ReadAt};

/// What InnoDB of MariaDB says of such a page.
const OTHER_PAGE: &[u8] = b"InnoDB: Space id and page no stored in the page, read in from";
/// The program is read in pieces of these many bytes.
const PIECE_BYTES: u64 = 1 << 20;
/// The index has an entry of 8 bytes for each function; MariaDB has about 40,000.
const LARGEST_INDEX: u64 = 16 << 20;
/// Version 1, a pointer relative to itself, a count of 4 bytes, a table relative to the index: what every linker writes.
const INDEX_FORM: [u8; 4] = [1, 0x1b, 0x03, 0x3b];

/// A function that was found so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ByText {
    /// Its address in the file.
    pub address: u64,
    /// Where it refers to the text.
    pub reference: u64,
    /// Whether a probe there is cheap.
    pub cheap: bool,
}

/// MariaDB's function that completes the read of a page; an explanation when it cannot be told.
pub(super) fn read_completion<F: ReadAt + ?Sized>(
    elf: &Elf<'_, F>,
) -> Result<Result<ByText, String>, ElfError> {
    let texts = find(elf, false, OTHER_PAGE.len() as u64, |piece, _| {
        piece
            .windows(OTHER_PAGE.len())
            .enumerate()
            .filter(|(_, window)| *window == OTHER_PAGE)
            .map(|(at, _)| at)
            .collect()
    })?;
    let [text] = texts[..] else {
        return Ok(Err(format!(
            "the text by which MariaDB's read completion is found is there {} times",
            texts.len()
        )));
    };
    let references = find(elf, true, 4, |piece, address| {
        let distances = piece.windows(4).enumerate();
        let refers = |(at, window): &(usize, &[u8])| {
            let end = address.wrapping_add(*at as u64 + 4);
            let distance = u32_le(window, 0).unwrap_or_default() as i32;
            end.wrapping_add_signed(i64::from(distance)) == text
        };
        distances.filter(refers).map(|(at, _)| at).collect()
    })?;
    let [reference] = references[..] else {
        return Ok(Err(format!("{} instructions refer to that text", references.len())));
    };
    let Some((index_at, index_bytes)) = elf.exception_index() else {
        return Ok(Err("the program has no index of its exception tables".to_owned()));
    };
    let index = elf.bytes_at(".eh_frame_hdr", index_at, index_bytes.min(LARGEST_INDEX))?;
    let Some(address) = function_around(&index, index_at, reference) else {
        return Ok(Err("no function of the exception tables lies around that instruction".to_owned()));
    };
    let place = elf.probe_place("read completion", Place { address })?;
    Ok(Ok(ByText { address, reference, cheap: place.emulated }))
}

/// Addresses at which `look` finds something, in all loaded parts that are code or are not. It is handed each piece with its address;
/// what it looks for has `bytes` bytes.
fn find<F: ReadAt + ?Sized>(
    elf: &Elf<'_, F>,
    in_code: bool,
    bytes: u64,
    look: impl Fn(&[u8], u64) -> Vec<usize>,
) -> Result<Vec<u64>, ElfError> {
    let mut found = Vec::new();
    for part in elf.loaded_parts().filter(|part| part.executable == in_code) {
        let mut into = 0;
        while into < part.bytes {
            let address = part.address.wrapping_add(into);
            // What lies across two pieces is in the first of them.
            let piece = elf.bytes_at("a loaded part", address, PIECE_BYTES + bytes - 1)?;
            let own = look(&piece, address).into_iter().filter(|at| (*at as u64) < PIECE_BYTES);
            found.extend(own.map(|at| address.wrapping_add(at as u64)));
            into += PIECE_BYTES;
        }
    }
    Ok(found)
}

/// The beginning of the function that an address lies in, by the sorted table of the index.
fn function_around(index: &[u8], index_at: u64, address: u64) -> Option<u64> {
    if index.get(..4)? != INDEX_FORM {
        return None;
    }
    let count = u32_le(index, 8)? as usize;
    let table = index.get(12..12_usize.checked_add(count.checked_mul(8)?)?)?;
    let begins = table
        .chunks_exact(8)
        .filter_map(|entry| Some(index_at.wrapping_add_signed(i64::from(u32_le(entry, 0)? as i32))));
    begins.filter(|begin| *begin <= address).max()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(begins: &[i32]) -> Vec<u8> {
        let mut bytes = INDEX_FORM.to_vec();
        bytes.extend([0; 4]);
        bytes.extend((begins.len() as u32).to_le_bytes());
        for begin in begins {
            bytes.extend(begin.to_le_bytes());
            bytes.extend([0; 4]);
        }
        bytes
    }

    #[test]
    fn the_function_around_an_address_is_found() {
        let index = index(&[-0x800, -0x400, 0x100]);
        assert_eq!(function_around(&index, 0x1000, 0xbff), Some(0x800));
        assert_eq!(function_around(&index, 0x1000, 0xc00), Some(0xc00));
        assert_eq!(function_around(&index, 0x1000, 0x5000), Some(0x1100));
        assert_eq!(function_around(&index, 0x1000, 0x7ff), None);
        for length in 0..index.len() {
            assert_eq!(function_around(&index[..length], 0x1000, 0x900), None);
        }
    }

    proptest! {
        #[test]
        fn any_index_is_read(bytes in prop::collection::vec(any::<u8>(), 0..100), address in any::<u64>()) {
            let _ = function_around(&bytes, 0x1000, address);
            let _ = function_around(&[&INDEX_FORM[..], &bytes].concat(), u64::MAX, address);
        }
    }
}
