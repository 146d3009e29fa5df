//! A made-up guest and its disk: what the model tests of the engine use.

use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

#[allow(dead_code, reason = "the tests beside the engine use more of it")]
#[path = "../../../dom0-migrator/src/engine/tests/guest_stream.rs"]
pub mod guest_stream;
#[allow(dead_code, reason = "the tests beside the engine use more of it")]
#[path = "../../../dom0-migrator/src/engine/tests/pair.rs"]
pub mod pair;

pub use pair::{XVDA, map};

/// A disk that many inputs may read: page i is `disk_page(i)`.
pub fn disk_of_64_pages() -> &'static Path {
    static DISK: OnceLock<tempfile::NamedTempFile> = OnceLock::new();
    DISK.get_or_init(|| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in 0..64 {
            file.write_all(&guest_stream::disk_page(page)).unwrap();
        }
        file.flush().unwrap();
        file
    })
    .path()
}
