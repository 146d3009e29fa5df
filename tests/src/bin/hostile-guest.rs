//! Root of a guest that means harm: publishes the worst lists ([`tests::hostile`]) in this machine's memory, through the nodes that the
//! kernel module would write, for as long as nothing lies at a path; then takes the nodes back.
//!
//! ```text
//! hostile-guest KIND PAGES STOP      KIND: endless, circle or restless; PAGES: of this machine's memory
//! ```
//!
//! It must not be mistaken for the module, which must not be loaded beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use enlightenment::xenstore::{
    ANSWER, DIRECTORY, EVENT_CHANNEL, GENERATION, REQUEST, ROOT_PFN, RequestKind, VERSION, parse_request,
};
use enlightenment::{ABI_VERSION, PAGE_SIZE};
use tests::hostile::{Guest, Kind, Lists};

/// Pages of lists: about 1.4 million different entries.
const PAGES: usize = 8192;
/// Between two looks at xenstore, and between two changes of the lists.
const LOOK: Duration = Duration::from_millis(100);
const CHANGE: Duration = Duration::from_millis(5);
/// `xvda`, and its size in sectors of 512 bytes.
const VDEV: u32 = 51712;
const SIZE: &str = "/sys/block/xvda/size";
/// Another one's disk, as dom0 names it: where a toolstack that believed a guest's own nodes would read it.
const ANOTHER: &str = "/dev/vda";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, pages, stop] = arguments.as_slice() else {
        bail!("usage: hostile-guest endless|circle|restless PAGES STOP");
    };
    let kind = Kind::ALL.iter().find(|(name, _)| name == kind).context("an unknown kind of lists")?.1;
    let sectors: u64 = fs::read_to_string(SIZE).with_context(|| SIZE.to_owned())?.trim().parse()?;
    let guest = Guest { pages: pages.parse()?, vdev: VDEV, disk_bytes: sectors * 512 };
    let (memory, pfns) = locked_pages()?;
    let mut lists = Lists::write(kind, guest, memory, pfns, fastrand::Rng::new());
    println!("{kind:?} lists at PFN {}", lists.root());
    let mut store = Xenstore::open()?;
    let (mut looked, mut changed) = (None::<Instant>, Instant::now());
    while !Path::new(stop).exists() {
        if looked.is_none_or(|at| at.elapsed() >= LOOK) {
            looked = Some(Instant::now());
            // While the guest is on its way its requests may fail.
            if let Err(error) = publish(&mut store, &lists) {
                eprintln!("{error:#}");
                store = Xenstore::open()?;
            }
        }
        if kind == Kind::Restless || changed.elapsed() >= CHANGE {
            changed = Instant::now();
            lists.scribble();
        }
        if kind == Kind::Restless {
            std::thread::yield_now();
        } else {
            std::thread::sleep(CHANGE);
        }
    }
    store.ask(Xenstore::REMOVE, DIRECTORY, b"")?;
    Ok(())
}

/// Memory that stays where it is, and the PFN of each of its pages.
fn locked_pages() -> Result<(&'static mut [[u8; PAGE_SIZE]], Vec<u64>)> {
    // Aligned as pages are: so long a piece is a mapping of its own, but for a header before it.
    let room = vec![1_u8; (PAGES + 1) * PAGE_SIZE].leak();
    let skip = room.as_ptr().align_offset(PAGE_SIZE);
    let (pages, _) = room[skip..].as_chunks_mut::<PAGE_SIZE>();
    let pages = &mut pages[..PAGES];
    // SAFETY: the range is this slice's.
    if unsafe { libc::mlock(pages.as_ptr().cast(), size_of_val(pages)) } != 0 {
        return Err(io::Error::last_os_error()).context("mlock");
    }
    let mut entries = vec![0; PAGES * 8];
    let at = pages.as_ptr() as u64 / PAGE_SIZE as u64 * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, at).context("/proc/self/pagemap")?;
    // Bits 0 to 54 are the frame's number, bit 63 says that there is one (Linux, admin-guide/mm/pagemap).
    let (entries, _) = entries.as_chunks::<8>();
    let pfns: Vec<u64> = entries.iter().map(|entry| u64::from_le_bytes(*entry) & ((1 << 55) - 1)).collect();
    if pfns.contains(&0) {
        bail!("a page has no number: this needs root");
    }
    Ok((pages, pfns))
}

/// Writes the nodes that are not there, and answers what is asked.
fn publish(store: &mut Xenstore, lists: &Lists<'_>) -> Result<()> {
    let node = |name: &str| format!("{DIRECTORY}/{name}");
    let generation = lists.generation();
    if store.read(&node(ROOT_PFN))?.as_deref() != Some(lists.root().to_string().as_bytes()) {
        store.write(&node(ROOT_PFN), &lists.root().to_string())?;
        store.write(&node(GENERATION), &generation.to_string())?;
        // No such port; and an answer that is longer than any.
        store.write(&node(EVENT_CHANNEL), &u32::MAX.to_string())?;
        store.write(&node(ANSWER), &"9".repeat(2000))?;
        if store.read(&node(REQUEST))?.is_none() {
            store.write(&node(REQUEST), "")?;
        }
        for lie in ["params", "physical-device-path", "type"] {
            // What of these a guest may write is not the question here.
            let _ = store.write(&format!("device/vbd/{VDEV}/{lie}"), ANOTHER);
            let _ = store.write(&format!("{DIRECTORY}/device/vbd/{}/{lie}", VDEV + 16), ANOTHER);
        }
        store.write(&node(VERSION), &ABI_VERSION.to_string())?;
    }
    let request = store.read(&node(REQUEST))?.and_then(|value| parse_request(&value));
    if let Some((number, RequestKind::Snapshot)) = request {
        let answer = format!("{number} {generation}");
        let has_number = |value: Vec<u8>| value.starts_with(format!("{number} ").as_bytes());
        if !store.read(&node(ANSWER))?.is_some_and(has_number) {
            store.write(&node(ANSWER), &answer)?;
        }
    }
    Ok(())
}

/// The guest's connection to xenstored (`xen/include/public/io/xs_wire.h`).
struct Xenstore(File);

impl Xenstore {
    const READ: u32 = 2;
    const WRITE: u32 = 11;
    const REMOVE: u32 = 13;
    const ERROR: u32 = 16;

    fn open() -> Result<Self> {
        let path = "/dev/xen/xenbus";
        Ok(Self(OpenOptions::new().read(true).write(true).open(path).context(path)?))
    }

    /// The answer to a request about a node; none when xenstored refuses.
    fn ask(&mut self, kind: u32, node: &str, value: &[u8]) -> Result<Option<Vec<u8>>> {
        let payload = [node.as_bytes(), b"\0", value].concat();
        let head = [kind, 0, 0, payload.len() as u32];
        let mut message: Vec<u8> = head.iter().flat_map(|word| word.to_ne_bytes()).collect();
        message.extend(payload);
        self.0.write_all(&message).context("cannot ask xenstored")?;
        let mut head = [0; 16];
        self.0.read_exact(&mut head).context("xenstored does not answer")?;
        let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut body = vec![0; word(12) as usize];
        self.0.read_exact(&mut body).context("xenstored's answer ends early")?;
        Ok((word(0) != Self::ERROR).then_some(body))
    }

    fn read(&mut self, node: &str) -> Result<Option<Vec<u8>>> {
        self.ask(Self::READ, node, b"")
    }

    fn write(&mut self, node: &str, value: &str) -> Result<()> {
        self.ask(Self::WRITE, node, value.as_bytes())?
            .with_context(|| format!("xenstored does not take {node}"))
            .map(drop)
    }
}
