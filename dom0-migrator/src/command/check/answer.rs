//! What a target answers to `check`: what it is and has. Nothing is begun by it, and nothing is changed.

use std::io::{self, Read};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::command::tls::Deadlined;
use crate::control;
use crate::engine::disk::{AlignedBuffer, Disk};
use crate::engine::xen_stream::PAGE;
use crate::inquiry::{
    DISKS_MAX, Digest, DiskFindings, DiskInquiry, Findings, Inquiry, Measured, SAMPLES_MAX,
};

/// For how long reading is tried out.
const READING: Duration = Duration::from_secs(1);
/// Bytes of one read then: as many as neighbours in a pool give, once they are merged.
const READ: usize = 128 * 1024;
/// Reads at once.
const DEPTH: usize = 8;
/// Bytes that are read at most, of storage that is very fast.
const READ_MAX: u64 = 1 << 30;
/// For how long bytes that try out the link are taken.
const LINK: Duration = Duration::from_secs(60);
/// Bytes of them at most.
pub const LINK_BYTES_MAX: u64 = 8 << 30;

/// Answers an inquiry. `refused_because` and `stock_because` are what a migration would hear.
pub fn answer(
    inquiry: &Inquiry,
    refused_because: Option<String>,
    stock_because: Option<String>,
) -> Result<Findings, String> {
    let samples: usize = inquiry.disks.iter().map(|disk| disk.samples.len()).sum();
    if inquiry.disks.len() > DISKS_MAX || samples > SAMPLES_MAX {
        return Err(format!(
            "{} disks and {samples} samples are asked about; {DISKS_MAX} and {SAMPLES_MAX} at most are answered",
            inquiry.disks.len()
        ));
    }
    let opened: Vec<_> = inquiry.disks.iter().map(|disk| Disk::open(&disk.path)).collect();
    let disks = inquiry.disks.iter().zip(&opened).map(|(asked, disk)| match disk {
        Ok(disk) => compare(asked, disk),
        Err(error) => DiskFindings { problem: Some(error.to_string()), same: Vec::new() },
    });
    let disks = disks.collect();
    let places: Vec<(&Disk, u64)> = inquiry
        .disks
        .iter()
        .zip(&opened)
        .filter_map(|(asked, disk)| Some((asked, disk.as_ref().ok()?)))
        .flat_map(|(asked, disk)| asked.samples.iter().map(move |sample| (disk, sample.offset)))
        .collect();
    let (free_memory_bytes, dom0_gives_way) = free_memory();
    Ok(Findings {
        version: env!("CARGO_PKG_VERSION").into(),
        refused_because,
        stock_because,
        free_memory_bytes,
        dom0_gives_way,
        disks,
        storage: try_out(&places),
    })
}

/// Whether the samples' bytes are the same here.
fn compare(asked: &DiskInquiry, disk: &Disk) -> DiskFindings {
    let mut buffer = AlignedBuffer::default();
    let mut problem = None;
    let mut same = |offset: u64, digest: Digest| {
        // Reads begin at multiples of a page; what is looked for may lie across two.
        let page = PAGE as u64;
        let start = offset / page * page;
        if !disk.holds_page(offset) {
            return false;
        }
        match disk.read(buffer.get(2 * PAGE), start) {
            Ok(read) => {
                let at = (offset - start) as usize;
                let bytes = buffer.bytes().get(..read).and_then(|bytes| bytes.get(at..at + PAGE));
                bytes.is_some_and(|bytes| Digest::of(bytes) == digest)
            }
            Err(error) => {
                problem = Some(format!("reading {} at {start}: {error}", asked.path.display()));
                false
            }
        }
    };
    let same = asked.samples.iter().map(|sample| same(sample.offset, sample.digest)).collect();
    DiskFindings { problem, same }
}

/// How fast these places, and what follows them, can be read; several at once, as the restorer does.
fn try_out(places: &[(&Disk, u64)]) -> Option<Measured> {
    if places.is_empty() {
        return None;
    }
    let (next, bytes, failed) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..DEPTH {
            scope.spawn(|| {
                let mut buffer = AlignedBuffer::with_room(READ);
                while began.elapsed() < READING && bytes.load(Ordering::Relaxed) < READ_MAX {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let (disk, offset) = places[number % places.len()];
                    let further = (number / places.len()) as u64;
                    let block = READ as u64;
                    let blocks = (disk.size() / block).max(1);
                    let start = (offset / block + further) % blocks * block;
                    match disk.read(buffer.get(READ), start) {
                        Ok(read) => bytes.fetch_add(read as u64, Ordering::Relaxed),
                        Err(_) => return failed.store(true, Ordering::Relaxed),
                    };
                }
            });
        }
    });
    let measured = Measured { bytes: bytes.into_inner(), seconds: began.elapsed().as_secs_f64() };
    (!failed.into_inner() && measured.bytes > 0).then_some(measured)
}

/// Memory that xl says is free, and whether it would take some from dom0.
pub fn free_memory() -> (Option<u64>, bool) {
    let Ok(output) = Command::new("xl").arg("info").stdin(Stdio::null()).output() else {
        return (None, false);
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let value = |name: &str| {
        let mut lines = said.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(found, _)| found.trim() == name).map(|(_, value)| value.trim())
    };
    let free = value("free_memory").and_then(|mebibytes| mebibytes.parse::<u64>().ok()?.checked_mul(1 << 20));
    // The default of `autoballoon` in xl.conf(5).
    let gives_way = value("xen_commandline").is_some_and(|line| !line.contains("dom0_mem="));
    (free, gives_way)
}

/// Takes bytes that try out the link, and says how many came.
///
/// # Errors
/// What the connection says.
pub fn take_link(socket: &mut TcpStream) -> io::Result<()> {
    let began = Instant::now();
    let mut timed = Deadlined { stream: socket, until: began + LINK };
    let mut buffer = vec![0; 256 * 1024];
    let mut bytes = 0;
    while bytes < LINK_BYTES_MAX {
        match timed.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => bytes += length as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let measured = Measured { bytes, seconds: began.elapsed().as_secs_f64() };
    control::write_line(socket, &measured).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inquiry::Sample;
    use std::io::Write;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_same_bytes_are_told_from_others_and_the_disk_is_tried_out() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i / 600) as u8).collect();
        let file = image(&bytes);
        // The second lies across two pages, the third has other bytes, the fourth lies beyond the end.
        let sample = |offset: usize, of: usize| Sample {
            offset: offset as u64,
            digest: Digest::of(&bytes[of..of + PAGE]),
        };
        let samples = vec![sample(8192, 8192), sample(4608, 4608), sample(4096, 8192), sample(299_008, 4096)];
        let disk =
            |path: &std::path::Path| DiskInquiry { vdev: 1, path: path.into(), samples: samples.clone() };
        let disks = vec![disk(file.path()), disk(std::path::Path::new("/nowhere"))];
        let found = answer(&Inquiry { disks, ..Inquiry::default() }, None, None).unwrap();
        assert_eq!(found.disks[0], DiskFindings { problem: None, same: vec![true, true, false, false] });
        assert!(found.disks[1].problem.as_ref().unwrap().contains("/nowhere"));
        assert!(found.storage.unwrap().rate() > 0.0);
    }

    #[test]
    fn an_inquiry_without_measure_is_refused() {
        let sample = Sample { offset: 0, digest: Digest::of_zeros() };
        let disk = DiskInquiry { vdev: 1, path: "/dev/null".into(), samples: vec![sample; SAMPLES_MAX + 1] };
        let inquiry = Inquiry { disks: vec![disk], ..Inquiry::default() };
        assert!(answer(&inquiry, None, None).unwrap_err().contains("1024"));
    }
}
