//! Files that the probe opens in the guest.

use guest_probe::derive::{read_completion_by_text, symbols};
use guest_probe::elf::{Elf, ReadAt};
use guest_probe::spaces::SpaceHeader;

/// An ELF file, with all that is asked of one.
pub fn elf(data: &[u8]) {
    let Ok(elf) = Elf::parse(data) else { return };
    if let Ok(id) = elf.build_id() {
        assert!(!id.is_empty() && id.bytes().all(|digit| digit.is_ascii_hexdigit()));
    }
    let _ = elf.first_address();
    let _ = elf.symbol_counts();
    if let Ok(places) = elf.symbols(&["first", "first_and_more"]) {
        for place in places {
            if let Ok(place) = elf.probe_place("first", place) {
                let mut byte = [0];
                assert!(data.read_exact_at(&mut byte, place.file_offset).is_ok() || !place.emulated);
            }
        }
    }
    if let Ok(found) = elf.symbols_where(|name| name.starts_with(b"f")) {
        assert!(found.iter().all(|symbol| symbol.name.starts_with('f') && symbol.address != 0));
    }
    for part in elf.loaded_parts() {
        let bytes = elf.bytes_at("a part", part.address, 100).unwrap_or_default();
        assert!(bytes.len() <= 100);
    }
    let _ = symbols(&elf);
    let _ = read_completion_by_text(&elf);
}

/// Page 0 of a data file.
pub fn tablespace(data: &[u8]) {
    if let Some(SpaceHeader { flags, .. }) = SpaceHeader::parse(data) {
        let _ =
            (flags.is_compressed(), flags.has_other_page_size(), flags.is_temporary(), flags.is_encrypted());
        assert!(data.len() >= 38 + 20);
    }
}
