//! Whether the process that started this helper is an `xl migrate`, and of a kind that the side channel is for.

use std::os::unix::process::parent_id;
use std::path::Path;

/// Why nothing is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotByXl {
    /// Another toolstack, or a save to a file.
    #[error("libxl was not called by `xl migrate`")]
    Other,
    /// The target gets another configuration, and may have the disks elsewhere.
    #[error("the target is given another configuration (-C), whose disks are not known here")]
    Configuration,
}

/// Looks at the command line of the process that has started this one.
///
/// # Errors
/// [`NotByXl`].
pub fn by_xl() -> Result<(), NotByXl> {
    let line = std::fs::read(format!("/proc/{}/cmdline", parent_id())).map_err(|_| NotByXl::Other)?;
    let line = String::from_utf8_lossy(&line);
    is_migration(&line.split_terminator('\0').collect::<Vec<_>>())
}

/// Reads a command line as xl does: options of its own, the command, and that one's options and arguments in any order.
fn is_migration(words: &[&str]) -> Result<(), NotByXl> {
    let (program, words) = words.split_first().ok_or(NotByXl::Other)?;
    let is_xl = Path::new(program).file_name().is_some_and(|name| name == "xl");
    let is_option = |word: &&&str| word.len() > 1 && word.starts_with('-');
    let own = words.iter().take_while(is_option).count();
    let mut rest = words.iter().skip(own);
    if !is_xl || rest.next() != Some(&"migrate") {
        return Err(NotByXl::Other);
    }
    while let Some(word) = rest.next() {
        // Short options may stand together; -s takes what follows, in its word or the next.
        let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.starts_with('-')) else {
            continue;
        };
        match letters.find(['C', 's']) {
            Some(at) if letters[at..].starts_with('C') => return Err(NotByXl::Configuration),
            Some(at) if at + 1 == letters.len() => {
                rest.next();
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<(), NotByXl> {
        is_migration(&line.split(' ').collect::<Vec<_>>())
    }

    #[test]
    fn only_migrations_of_xl_are_offered_something() {
        for line in [
            "xl migrate db1 host-b",
            "/usr/lib/xen-4.17/bin/xl -vvv -t migrate --debug db1 host-b",
            "xl migrate -p -s C db1 host-b",
            "xl migrate db1 host-b -e",
        ] {
            assert_eq!(read(line), Ok(()), "{line}");
        }
        assert_eq!(is_migration(&["xl", "migrate", "-s", "ssh -C", "db1", "host-b"]), Ok(()));
        for line in
            ["", "xl", "xl save db1 file", "xl -v save migrate", "virtxend --timeout 120", "xlsx migrate a b"]
        {
            assert_eq!(read(line), Err(NotByXl::Other), "{line}");
        }
        for line in ["xl migrate -C other.cfg db1 host-b", "xl migrate db1 host-b -eCother.cfg"] {
            assert_eq!(read(line), Err(NotByXl::Configuration), "{line}");
        }
    }

    #[test]
    fn this_test_was_not_started_by_xl() {
        assert_eq!(by_xl(), Err(NotByXl::Other));
    }
}
