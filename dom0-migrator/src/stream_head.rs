//! The beginning of xl's stream: its header, and the domain's configuration, from which the xl that receives makes the domain.
//!
//! ```text
//!  0 magic, 32 octets | 32 byte order u32 | 36 mandatory flags u32 | 40 optional flags u32 | 44 length u32
//! 48 length of the configuration u32 | configuration (JSON when bit 0 of the mandatory flags is set) | …
//! ```

/// Bytes before the configuration.
const HEAD: usize = 52;
/// xl's magic.
const MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
/// `SAVEFILE_BYTEORDER_VALUE`: only this machine's own order is understood.
const BYTE_ORDER: u32 = 0x0102_0304;
/// `XL_MANDATORY_FLAG_JSON`.
const JSON: u32 = 1;
/// Longest configuration that is looked at; real ones have a few kilobytes.
const CONFIGURATION_MAX: usize = 1 << 20;

/// Collects the configuration from a stream that passes by in pieces.
#[derive(Debug, Default)]
pub struct StreamHead {
    seen: Vec<u8>,
    done: bool,
}

impl StreamHead {
    /// Looks at a piece; the configuration when it is whole with it, once. What is no stream of xl's, or has no JSON in it, never
    /// gives one; nor is more of it kept than a mebibyte.
    pub fn take(&mut self, piece: &[u8]) -> Option<serde_json::Value> {
        if self.done {
            return None;
        }
        let room = (HEAD + CONFIGURATION_MAX).saturating_sub(self.seen.len());
        self.seen.extend(piece.iter().take(room));
        let head = self.seen.get(..HEAD)?;
        let number = |at: usize| {
            head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        let length = number(48) as usize;
        let understood = head.starts_with(MAGIC) && number(32) == BYTE_ORDER && number(36) & JSON != 0;
        if !understood || length > CONFIGURATION_MAX {
            self.give_up();
            return None;
        }
        let configuration = self.seen.get(HEAD..HEAD + length)?;
        // The C string ends in a NUL.
        let text = configuration.strip_suffix(&[0]).unwrap_or(configuration);
        let parsed = serde_json::from_slice(text).ok();
        self.give_up();
        parsed
    }

    fn give_up(&mut self) {
        self.done = true;
        self.seen = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(configuration: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for number in [BYTE_ORDER, 3, 0, configuration.len() as u32 + 4, configuration.len() as u32] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(configuration);
        bytes.extend(b"LibxlFmt and so on");
        bytes
    }

    #[test]
    fn the_configuration_is_found_however_it_comes() {
        let bytes = stream(b"{\"disks\":[]}\0");
        for step in [1, 13, 4096] {
            let mut head = StreamHead::default();
            let found: Vec<_> = bytes.chunks(step).filter_map(|piece| head.take(piece)).collect();
            assert_eq!(found, [serde_json::json!({"disks": []})], "{step}");
            assert!(head.seen.is_empty());
        }
    }

    #[test]
    fn another_stream_gives_none_and_is_not_kept() {
        let mut head = StreamHead::default();
        assert_eq!(head.take(&[7; 100]), None);
        assert!(head.done && head.seen.is_empty());
        let mut long = stream(b"{}");
        long[48..52].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(StreamHead::default().take(&long), None);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(at in 0_usize..80, value in any::<u64>()) {
            let mut bytes = stream(b"{\"disks\":[{}]}");
            let at = at.min(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
            let mut head = StreamHead::default();
            for piece in bytes.chunks(7) {
                let _ = head.take(piece);
            }
        }
    }
}
