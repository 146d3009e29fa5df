//! Where reports are kept.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{Date, LENGTH_MAX, ReportFile};

/// The directory, when no other is named.
pub const DIRECTORY: &str = "/var/lib/poolskip/reports";
/// Environment variable with another one.
pub const DIRECTORY_VARIABLE: &str = "POOLSKIP_REPORTS";

/// Longest part of a file's name that is the domain's.
const NAME_MAX: usize = 64;

/// Why a report could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StoreProblem {
    /// The system does not let us.
    #[error("the report could not be written to {}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It would be longer than what is read again.
    #[error("the report would have {0} bytes, {LENGTH_MAX} at most are read again")]
    TooLong(usize),
    /// It cannot be written as JSON.
    #[error("the report cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// [`DIRECTORY`], or the directory that [`DIRECTORY_VARIABLE`] names.
pub fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY_VARIABLE).map_or_else(|| DIRECTORY.into(), PathBuf::from)
}

/// `DOMAIN-DATE.json` in [`directory`].
pub fn default_path(domain: &str, began: Date) -> PathBuf {
    directory().join(format!("{}-{}.json", file_name(domain), began.compact()))
}

/// The newest report of a domain in a directory, by the dates in the names; none where there is no report of it.
pub fn newest(directory: &Path, domain: &str) -> Option<PathBuf> {
    let start = format!("{}-", file_name(domain));
    let names =
        std::fs::read_dir(directory).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // What somebody else has put there may have such a name too: what follows the domain's is a date, and nothing else.
    let is_date = |rest: &str| {
        rest.len() == DATE.len()
            && rest.bytes().zip(DATE.bytes()).all(|(have, want)| match want {
                b'0' => have.is_ascii_digit(),
                _ => have == want,
            })
    };
    let of_domain = |name: &String| {
        name.strip_prefix(&start).and_then(|rest| rest.strip_suffix(".json")).is_some_and(is_date)
    };
    names.filter(of_domain).max().map(|name| directory.join(name))
}

/// The form of a date in a file's name.
const DATE: &str = "00000000T000000Z";

/// A domain's name without what has a meaning in paths or on command lines.
fn file_name(domain: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._+".contains(c) { c } else { '_' };
    let name: String = domain.chars().take(NAME_MAX).map(plain).collect();
    if name.is_empty() || name.starts_with('.') { format!("_{name}") } else { name }
}

/// Writes a report, with the directories above it; it is there as a whole or not at all.
///
/// # Errors
/// [`StoreProblem`]; then no part of it is left.
pub fn write(report: &ReportFile, path: &Path) -> Result<(), StoreProblem> {
    let io = |source| StoreProblem::Io { path: path.to_owned(), source };
    let mut json = serde_json::to_vec(report)?;
    json.push(b'\n');
    if json.len() as u64 > LENGTH_MAX {
        return Err(StoreProblem::TooLong(json.len()));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(io)?;
    let is_special = std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
    if is_special {
        // A device or a pipe is written to, not replaced.
        let file = std::fs::File::options().write(true).open(path);
        return file.and_then(|mut file| file.write_all(&json)).map_err(io);
    }
    let mut file = tempfile::Builder::new().prefix(".report-").tempfile_in(directory).map_err(io)?;
    file.write_all(&json).map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;
    use crate::report_file::parse;

    #[test]
    fn a_report_is_written_whole_where_there_was_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/report.json");
        let report = example();
        write(&report, &path).unwrap();
        write(&report, &path).unwrap();
        assert_eq!(parse(&std::fs::read(&path).unwrap()).unwrap(), report);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_is_told_with_the_path() {
        let error = write(&example(), Path::new("/dev/full")).unwrap_err().to_string();
        assert!(error.contains("/dev/full") && error.contains("No space left"), "{error}");
        let error = write(&example(), Path::new("/proc/poolskip/report.json")).unwrap_err().to_string();
        assert!(error.contains("/proc/poolskip/report.json"), "{error}");
    }

    #[test]
    fn the_newest_report_of_a_domain_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        assert_eq!(newest(directory.path(), "db1"), None);
        assert_eq!(newest(&at("nowhere"), "db1"), None);
        let written = default_path("db-1", example().began);
        let name = written.file_name().unwrap().to_str().unwrap();
        for name in [name, "db1-20261126T100000Z.json", "db1-20261126T095959Z.json", "db1-notes-of-mine.json"]
        {
            std::fs::write(at(name), "").unwrap();
        }
        assert_eq!(newest(directory.path(), "db1"), Some(at("db1-20261126T100000Z.json")));
        assert_eq!(newest(directory.path(), "db-1"), Some(at(name)));
        assert_eq!(newest(directory.path(), "db"), None);
    }

    #[test]
    fn a_domain_s_name_leads_nowhere() {
        for (name, expected) in [("db1", "db1"), ("../etc/x", "_.._etc_x"), ("", "_"), ("a b\nä", "a_b__")] {
            assert_eq!(file_name(name), expected);
        }
        assert_eq!(file_name(&"x".repeat(500)).len(), NAME_MAX);
    }
}
