//! The words of `xl migrate-receive` to the xl that sends, and GO, the only one the other way (`tools/xl/xl.h` and
//! `xl_migrate.c`; the same since Xen 4.1).
//!
//! ```text
//! migrate-receive: banner … ready ◄─ GO ─ … report, status (0: it runs) [, GO: the sender may have it back]
//! ```

/// The first word, without a NUL.
pub const BANNER: &[u8] = b"xl migration receiver ready, send binary domain data.\n";
/// All has come; with its NUL, as the following ones.
pub const READY: &[u8] = b"domain received, ready to unpause\0";
/// Permission to run the domain.
pub const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";
/// A byte of status follows.
pub const REPORT: &[u8] = b"my copy unpause results are as follows\0";

/// A word that has come as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// [`BANNER`].
    Banner,
    /// [`READY`].
    Ready,
    /// [`REPORT`] and its status: 0 when the domain runs.
    Status(u8),
    /// [`GO`], after a status that is not 0.
    GoBack,
}

/// Something else came.
#[derive(Debug, thiserror::Error)]
#[error("xl migrate-receive said {said:?} where {expected} was expected; is it another xl?")]
pub struct UnexpectedWord {
    said: String,
    expected: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Banner,
    Ready,
    Report,
    Status,
    GoBack,
    Nothing,
}

impl Expected {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Banner => BANNER,
            Self::Ready => READY,
            Self::Report => REPORT,
            Self::GoBack => GO,
            Self::Status | Self::Nothing => &[],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Banner => "its banner",
            Self::Ready => "that all has come",
            Self::Report => "a report",
            Self::Status => "a status",
            Self::GoBack => "the permission to take it back",
            Self::Nothing => "nothing more",
        }
    }
}

/// Reads the words as they come, in pieces of any length.
#[derive(Debug)]
pub struct Words {
    expected: Expected,
    matched: usize,
}

impl Default for Words {
    fn default() -> Self {
        Self { expected: Expected::Banner, matched: 0 }
    }
}

impl Words {
    /// Takes bytes; the words that are whole with them.
    ///
    /// # Errors
    /// [`UnexpectedWord`] at the first byte that no word has there.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Vec<Word>, UnexpectedWord> {
        let mut words = Vec::new();
        for (at, &byte) in bytes.iter().enumerate() {
            if self.expected == Expected::Status {
                words.push(Word::Status(byte));
                self.expected = if byte == 0 { Expected::Nothing } else { Expected::GoBack };
                continue;
            }
            let expected = self.expected.bytes();
            if expected.get(self.matched) != Some(&byte) {
                let said = bytes.get(at..bytes.len().min(at + 40)).unwrap_or_default();
                return Err(UnexpectedWord {
                    said: String::from_utf8_lossy(said).into_owned(),
                    expected: self.expected.name(),
                });
            }
            self.matched += 1;
            if self.matched == expected.len() {
                self.matched = 0;
                self.expected = match self.expected {
                    Expected::Banner => {
                        words.push(Word::Banner);
                        Expected::Ready
                    }
                    Expected::Ready => {
                        words.push(Word::Ready);
                        Expected::Report
                    }
                    Expected::Report => Expected::Status,
                    Expected::GoBack => {
                        words.push(Word::GoBack);
                        Expected::Nothing
                    }
                    same => same,
                };
            }
        }
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_in_pieces_of_any_length() {
        let all = [BANNER, READY, REPORT, &[3], GO].concat();
        for step in [1, 2, 7, 50, 500] {
            let mut words = Words::default();
            let heard: Vec<Word> = all.chunks(step).flat_map(|piece| words.take(piece).unwrap()).collect();
            assert_eq!(heard, [Word::Banner, Word::Ready, Word::Status(3), Word::GoBack]);
        }
    }

    #[test]
    fn anything_else_is_refused_at_once() {
        let mut words = Words::default();
        assert!(words.take(b"xl migration receiver ready? ").unwrap_err().to_string().contains("its banner"));
        let mut words = Words::default();
        words.take(&[BANNER, READY, REPORT, &[0]].concat()).unwrap();
        assert!(words.take(b"x").is_err());
    }
}
