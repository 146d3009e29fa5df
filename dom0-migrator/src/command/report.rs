//! `report`: makes a page for a browser of a migration's report file.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use super::{EXIT_MIGRATED, EXIT_NOT_BEGUN};
use crate::html;
use crate::report_file::{self, LENGTH_MAX, ParseError, ReportFile};

/// Options of `report`.
#[derive(Debug, Args)]
pub struct Report {
    /// The report file that `migrate` wrote; or a domain's name, for its newest one in /var/lib/poolskip/reports (or in the directory that
    /// POOLSKIP_REPORTS names).
    #[arg(value_name = "FILE|DOMAIN")]
    pub file: PathBuf,
    /// The page to write; `-` is standard output.
    #[arg(short, long, value_name = "PAGE.html")]
    pub output: PathBuf,
    /// Another migration's report file, to compare with: one with libxl's own helper, say.
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Parse { path: PathBuf, source: ParseError },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

/// Writes the page.
pub fn run(options: &Report) -> u8 {
    match page(options) {
        Ok(()) => EXIT_MIGRATED,
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            EXIT_NOT_BEGUN
        }
    }
}

fn page(options: &Report) -> Result<(), ReportError> {
    let report = read(&of_domain(&options.file).unwrap_or_else(|| options.file.clone()))?;
    let other = options.compare.as_deref().map(read).transpose()?;
    let page = html::page(&report, other.as_ref());
    let written = if options.output == Path::new("-") {
        std::io::stdout().lock().write_all(page.as_bytes())
    } else {
        std::fs::write(&options.output, page)
    };
    written.map_err(|source| ReportError::Write { path: options.output.clone(), source })
}

/// The newest report of a domain, if it is a domain's name: one that no file has.
fn of_domain(name: &Path) -> Option<PathBuf> {
    let is_name = name.components().count() == 1 && !name.exists();
    report_file::newest(&report_file::directory(), name.to_str().filter(|_| is_name)?)
}

/// Reads a file, not more of it than a report may have.
fn read(path: &Path) -> Result<ReportFile, ReportError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LENGTH_MAX + 1).read_to_end(&mut bytes))
        .map_err(|source| ReportError::Read { path: path.to_owned(), source })?;
    report_file::parse(&bytes).map_err(|source| ReportError::Parse { path: path.to_owned(), source })
}
