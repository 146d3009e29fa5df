//! Answering another host's `doctor`.

use std::io::{self, BufRead, Read as _, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use super::blocks::{Key, Looked};
use super::{Answer, Blocks, Host, LINK_MAX, OFFSETS_MAX, Question};
use crate::control::{self, FromSource, FromTarget, LineError};

/// Questions that one connection may bring.
const QUESTIONS_MAX: usize = 4096;

/// Answers a first question, and all that follow on the same connection, until the other side has no more. `host` looks at this host.
///
/// # Errors
/// [`LineError`] when the connection breaks or brings something else.
pub fn attend(
    first: Question,
    lines: &mut impl BufRead,
    to: &mut impl Write,
    host: &dyn Fn() -> Host,
) -> Result<(), LineError> {
    let mut question = first;
    for _ in 0..QUESTIONS_MAX {
        let answer = match question {
            Question::Host => Answer::Host(Box::new(host())),
            Question::Clock => Answer::Clock(now()),
            Question::Blocks(blocks) => look(&blocks).unwrap_or_else(Answer::Not),
            Question::Link { bytes } if bytes <= LINK_MAX => {
                say(to, Answer::Ready)?;
                let arrived = io::copy(&mut lines.take(bytes), &mut io::sink())?;
                if arrived < bytes {
                    return Err(LineError::Closed);
                }
                Answer::Arrived
            }
            Question::Link { bytes } => Answer::Not(format!("{bytes} bytes are more than {LINK_MAX}")),
        };
        say(to, answer)?;
        question = match control::read_line(lines) {
            Ok(FromSource::Examine(question)) => question,
            Ok(other) => {
                say(to, Answer::Not(format!("{other:?} has no place in an examination")))?;
                return Ok(());
            }
            Err(LineError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        };
    }
    Ok(())
}

fn say(to: &mut impl Write, answer: Answer) -> Result<(), LineError> {
    control::write_line(to, &FromTarget::Examined(answer))
}

/// Nanoseconds after 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads blocks. The path is whatever the other host says, which has shown a certificate, and could as well send a domain with that disk.
fn look(blocks: &Blocks) -> Result<Answer, String> {
    if blocks.offsets.len() > OFFSETS_MAX {
        return Err(format!("{} blocks are more than {OFFSETS_MAX}", blocks.offsets.len()));
    }
    let key = Key::parse(&blocks.key).ok_or("a key has 64 hexadecimal digits")?;
    let mut disk = Looked::open(&blocks.path).map_err(|error| error.to_string())?;
    let size = disk.size();
    let mut hashes = Vec::new();
    for offset in &blocks.offsets {
        match disk.read(*offset, key) {
            Ok(block) => hashes.push(block.hash),
            // A disk that is shorter than the other one: the size says it.
            Err(_) if offset.checked_add(super::blocks::BLOCK).is_none_or(|end| end > size) => {
                hashes.push(String::new())
            }
            Err(error) => return Err(format!("{} at {offset}: {error}", blocks.path.display())),
        }
    }
    Ok(Answer::Blocks { size, hashes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(questions: &[FromSource], raw: &[u8]) -> (Result<(), LineError>, Vec<FromTarget>) {
        let mut bytes = Vec::new();
        for question in questions {
            control::write_line(&mut bytes, question).unwrap();
        }
        bytes.extend_from_slice(raw);
        let host = || Host {
            version: "1".into(),
            stream_version: 1,
            xen: None,
            free_mib: Some(7),
            findings: Vec::new(),
        };
        let mut lines = &bytes[..];
        let FromSource::Examine(first) = control::read_line(&mut lines).unwrap() else { panic!() };
        let mut said = Vec::new();
        let done = attend(first, &mut lines, &mut said, &host);
        let mut said = &said[..];
        let mut answers = Vec::new();
        while let Ok(answer) = control::read_line(&mut said) {
            answers.push(answer);
        }
        (done, answers)
    }

    fn not(answer: &FromTarget) -> &str {
        match answer {
            FromTarget::Examined(Answer::Not(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn questions_are_answered_in_turn() {
        let (done, said) =
            asked(&[FromSource::Examine(Question::Host), FromSource::Examine(Question::Clock)], &[]);
        done.unwrap();
        assert!(matches!(
            &said[..],
            [FromTarget::Examined(Answer::Host(_)), FromTarget::Examined(Answer::Clock(_))]
        ));
    }

    #[test]
    fn bytes_of_the_link_are_counted_and_cut_off_ones_noticed() {
        let link = [FromSource::Examine(Question::Link { bytes: 1000 })];
        let (done, said) = asked(&link, &[0; 1000]);
        done.unwrap();
        assert!(matches!(
            said[..],
            [FromTarget::Examined(Answer::Ready), FromTarget::Examined(Answer::Arrived)]
        ));
        assert!(matches!(asked(&link, &[0; 999]).0, Err(LineError::Closed)));
        let (_, said) = asked(&[FromSource::Examine(Question::Link { bytes: LINK_MAX + 1 })], &[]);
        assert!(not(&said[0]).contains("more than"));
    }

    #[test]
    fn what_is_no_disk_is_not_read() {
        let blocks = |path: &str, key: &str, offsets: Vec<u64>| {
            let question = Question::Blocks(Blocks { path: path.into(), key: key.into(), offsets });
            asked(&[FromSource::Examine(question)], &[]).1
        };
        let key = "ab".repeat(32);
        for (path, key, offsets, why) in [
            ("/dev/zero", &key[..], vec![0], "neither a block device"),
            ("relative", &key, vec![0], "not an absolute path"),
            ("/nowhere", &key, vec![0], "No such file"),
            ("/nowhere", "x", vec![0], "64 hexadecimal digits"),
            ("/nowhere", &key, vec![0; 257], "more than 256"),
        ] {
            let said = blocks(path, key, offsets);
            assert!(not(&said[0]).contains(why), "{said:?}");
        }
        let (_, said) = asked(&[FromSource::Examine(Question::Clock), FromSource::GaveUp], &[]);
        assert!(not(&said[1]).contains("no place"));
    }
}
