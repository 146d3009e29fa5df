//! Blocks: pieces of a stream, as they go over one of several connections. `docs/stream.md` draws them.

/// Version of what is drawn there. Between hosts that differ in it the stream goes over one connection, as it is.
pub const VERSION: u16 = 1;
/// Bytes of a stream in a block at most.
pub const BLOCK_MAX: usize = 128 * 1024;
/// Bytes of a block's header.
pub const HEADER: usize = 24;
/// Its first bytes.
const MAGIC: [u8; 4] = *b"PsBk";
/// What stands in a codec's place in a connection's last header.
const END: u8 = 255;

/// How a block's bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Raw,
    /// LZ4, the block format without a frame.
    Lz4,
    /// A frame of zstd.
    Zstd,
}

impl Codec {
    fn number(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// A block follows.
    Block {
        /// Its place in the stream, from 0.
        number: u64,
        /// How it is written.
        codec: Codec,
        /// Bytes of the stream.
        length: usize,
        /// Bytes that follow.
        stored: usize,
    },
    /// Nothing follows on this connection.
    End {
        /// Blocks of the whole stream, over all connections.
        blocks: u64,
    },
}

/// Why bytes are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else.
    #[error("something that is no block")]
    Magic,
    /// A codec that nobody offered.
    #[error("a block of kind {0}")]
    Kind(u8),
    /// Lengths that cannot be.
    #[error("a block of {length} bytes, written as {stored}")]
    Length {
        /// Bytes of the stream.
        length: u32,
        /// Bytes that follow.
        stored: u32,
    },
}

impl Header {
    /// As it is written.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let (kind, number, length, stored) = match self {
            Self::Block { number, codec, length, stored } => (codec.number(), number, length, stored),
            Self::End { blocks } => (END, blocks, 0, 0),
        };
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = kind;
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        bytes[16..20].copy_from_slice(&(length as u32).to_le_bytes());
        bytes[20..].copy_from_slice(&(stored as u32).to_le_bytes());
        bytes
    }

    /// Reads one. What it lets pass is at most [`BLOCK_MAX`] bytes long, before and after decompression.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, HeaderError> {
        let [m0, m1, m2, m3, kind, z0, z1, z2, rest @ ..] = *bytes;
        if [m0, m1, m2, m3] != MAGIC || [z0, z1, z2] != [0; 3] {
            return Err(HeaderError::Magic);
        }
        let u32_at = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let number = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
        let (length, stored) = (u32_at(8), u32_at(12));
        let codec = match kind {
            0 => Codec::Raw,
            1 => Codec::Lz4,
            2 => Codec::Zstd,
            END if (length, stored) == (0, 0) => return Ok(Self::End { blocks: number }),
            END => return Err(HeaderError::Length { length, stored }),
            kind => return Err(HeaderError::Kind(kind)),
        };
        let fits = if codec == Codec::Raw { stored == length } else { (1..length).contains(&stored) };
        if !fits || length == 0 || length as usize > BLOCK_MAX {
            return Err(HeaderError::Length { length, stored });
        }
        Ok(Self::Block { number, codec, length: length as usize, stored: stored as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_come_back_as_they_went() {
        for header in [
            Header::Block { number: 1 << 40, codec: Codec::Raw, length: BLOCK_MAX, stored: BLOCK_MAX },
            Header::Block { number: 0, codec: Codec::Lz4, length: 2, stored: 1 },
            Header::Block { number: 7, codec: Codec::Zstd, length: BLOCK_MAX, stored: 9 },
            Header::End { blocks: u64::MAX },
        ] {
            assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        }
    }

    /// Holds the code to the example in the documentation.
    #[test]
    fn the_documentation_has_a_header() {
        let page = include_str!("../../../../docs/stream.md");
        let (_, rest) = page.split_once("```hex block\n").unwrap();
        let (text, _) = rest.split_once("```").unwrap();
        let bytes: Vec<u8> =
            text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let header = Header::parse(bytes[..HEADER].try_into().unwrap()).unwrap();
        assert_eq!(header, Header::Block { number: 5, codec: Codec::Raw, length: 8, stored: 8 });
        assert_eq!(bytes.len(), HEADER + 8);
        let end = Header::parse(&Header::End { blocks: 6 }.to_bytes()).unwrap();
        assert_eq!(end, Header::End { blocks: 6 });
    }

    proptest! {
        #[test]
        fn whatever_is_let_pass_is_bounded(mut bytes: [u8; HEADER], ours: bool) {
            if ours {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4] %= 3;
                bytes[5..8].fill(0);
                bytes[18..20].fill(0);
                bytes[22..].fill(0);
            }
            if let Ok(Header::Block { length, stored, .. }) = Header::parse(&bytes) {
                prop_assert!(length <= BLOCK_MAX && stored <= length && stored > 0);
            }
        }
    }
}
