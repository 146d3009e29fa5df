//! xenstore's messages (`xen/include/public/io/xs_wire.h`): a header of four 32-bit numbers and at most 4,096 bytes of payload.

/// Bytes of a header.
pub const HEADER: usize = 16;
/// Longest payload.
pub const PAYLOAD_MAX: usize = 4096;

/// Kinds of messages that this client sends or understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Names below a node.
    Directory = 1,
    /// A node's value.
    Read = 2,
    /// Tell when a node or one below it changes.
    Watch = 4,
    /// Set a node's value.
    Write = 11,
    /// A watch fired; sent by xenstored at any time.
    WatchEvent = 15,
    /// A suspended domain goes on where it is.
    Resume = 18,
    /// The request failed; the payload is the error's name.
    Error = 16,
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The kind ([`Kind`]), as a number.
    pub kind: u32,
    /// The request's number, repeated in its reply.
    pub request: u32,
    /// Bytes that follow.
    pub length: u32,
}

impl Header {
    /// Its bytes; the transaction is 0, "none".
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..4].copy_from_slice(&self.kind.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.request.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.length.to_ne_bytes());
        bytes
    }

    /// Parses one. `None` when the payload would be longer than xenstore allows.
    pub fn decode(bytes: [u8; HEADER]) -> Option<Self> {
        let at = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let header = Self { kind: at(0), request: at(4), length: at(12) };
        (header.length as usize <= PAYLOAD_MAX).then_some(header)
    }
}

/// Joins parts of a payload; `terminated` ones get a NUL.
pub fn payload(parts: &[(&[u8], bool)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (part, terminated) in parts {
        bytes.extend_from_slice(part);
        if *terminated {
            bytes.push(0);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_go_and_come() {
        let header = Header { kind: Kind::Read as u32, request: 7, length: 12 };
        assert_eq!(header.encode(), [2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0]);
        assert_eq!(Header::decode(header.encode()), Some(header));
        assert_eq!(Header::decode(Header { length: 4097, ..header }.encode()), None);
    }
}
