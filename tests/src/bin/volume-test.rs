//! Tries the storage map on volumes of a real device mapper: the first process of a machine without anything else.
//!
//! `cargo xtask test volume` puts this program as `/init`, with Debian's `dmsetup`, `mke2fs` and `resize2fs`, into an initramfs and boots it
//! under plain QEMU with two disks: the first has a partition, the second none. One line a case goes to the console; the last says how
//! many passed, and without it the test has failed. What LVM would have the device mapper do, `dmsetup` has it do here:
//!
//! ```text
//! volume   ├──── piece 0: partition of disk 0 ────┼── piece 1: another volume, on disk 1 ──┼─ piece 2, later: disk 0 ─┤
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use enlightenment::Vdev;
use guest_probe::disk::{DeviceNumber, Disks};
use guest_probe::left_out::LeftOut;
use guest_probe::storage_map::{DiskRule, StorageMap};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use tests::disk::run;
use tests::storage::{
    Mounted, a_map_made_anew_follows_the_files, every_page_is_found_or_has_a_reason, write_pages,
};

/// Said to this program when it is to stand in a directory, in mysqld's place.
const STAND: &str = "stand";
/// Sectors of a piece: 12 MiB.
const PIECE: u64 = 24_576;
/// Where piece 0 begins on the partition, piece 1 on the other volume, that one on disk 1, and piece 2 on disk 0, in sectors.
const PIECE_0: u64 = 2_048;
const PIECE_1: u64 = 16;
const LOWER: u64 = 8;
const PIECE_2: u64 = 131_072;
/// Where piece 1 is moved to on disk 1.
const MOVED_TO: u64 = 98_304;
/// Bytes in a sector.
const SECTOR: u64 = 512;
/// Alignment of direct I/O.
const DIRECT: usize = 4096;

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|word| word == STAND) {
        loop {
            thread::park();
        }
    }
    if std::process::id() != 1 {
        eprintln!("this is the first process of a test machine: run `cargo xtask test volume`");
        return ExitCode::FAILURE;
    }
    match begin().and_then(|disks| cases(&disks)) {
        Ok((passed, failed)) => println!("volume test: {passed} passed, {failed} failed"),
        Err(error) => println!("volume test: cannot begin: {error:#}"),
    }
    let _ = reboot(RebootMode::RB_POWER_OFF);
    ExitCode::FAILURE
}

/// What every program finds, the modules, and the disks.
fn begin() -> Result<[WholeDisk; 2]> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run")] {
        fs::create_dir_all(place)?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {place}"))?;
    }
    for name in fs::read_to_string("/modules/order").context("no modules")?.lines() {
        let file = File::open(Path::new("/modules").join(name))?;
        finit_module(&file, c"", ModuleInitFlags::empty())
            .with_context(|| format!("cannot load the module {name}"))?;
    }
    for device in ["/dev/vda1", "/dev/vdb"] {
        wait_for_file(device)?;
    }
    Ok([WholeDisk::open("vda")?, WholeDisk::open("vdb")?])
}

fn wait_for_file(path: &str) -> Result<()> {
    let start = Instant::now();
    while !Path::new(path).exists() {
        ensure!(start.elapsed() < Duration::from_secs(120), "{path} does not come");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

type Case<'a> = (&'static str, &'a dyn Fn() -> Result<()>);

fn cases(disks: &[WholeDisk; 2]) -> Result<(usize, usize)> {
    let volume = Volume::make(disks)?;
    let all: [Case<'_>; 5] = [
        ("a volume of two pieces, one of them on another volume", &|| volume.of_two_pieces()),
        ("files come, grow, shrink, move and go on it", &|| volume.life()),
        ("it is extended while it is used", &|| volume.extended()),
        ("a piece is moved while it is used", &|| volume.moved()),
        ("a striped volume is left out with that reason", &striped),
    ];
    let (mut passed, mut failed) = (0, 0);
    for (name, case) in all {
        match case() {
            Ok(()) => {
                passed += 1;
                println!("pass {name}");
            }
            Err(error) => {
                failed += 1;
                println!("FAIL {name}: {error:#}");
            }
        }
    }
    Ok((passed, failed))
}

/// A disk as the machine has it, read and written past all caches.
struct WholeDisk {
    number: DeviceNumber,
    file: File,
}

impl WholeDisk {
    fn open(name: &str) -> Result<Self> {
        let number = fs::read_to_string(format!("/sys/block/{name}/dev"))?;
        let number = number.parse().ok().with_context(|| format!("{name} is {number:?}"))?;
        let mut options = File::options();
        let file =
            options.read(true).write(true).custom_flags(libc::O_DIRECT).open(format!("/dev/{name}"))?;
        Ok(Self { number, file })
    }

    /// As the map numbers it where any disk will do.
    fn vdev(&self) -> Vdev {
        Vdev(self.number.major << 20 | self.number.minor)
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut room = Aligned::new(length);
        self.file.read_exact_at(room.bytes(), offset)?;
        Ok(room.bytes().to_vec())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut room = Aligned::new(bytes.len());
        room.bytes().copy_from_slice(bytes);
        Ok(self.file.write_all_at(room.bytes(), offset)?)
    }
}

/// Bytes at an address that direct I/O takes.
struct Aligned {
    room: Vec<u8>,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        Self { room: vec![0; length + DIRECT], length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let skip = self.room.as_ptr().align_offset(DIRECT);
        &mut self.room[skip..skip + self.length]
    }
}

/// The volume, with a file system on it.
struct Volume<'a> {
    disks: &'a [WholeDisk; 2],
    process: Child,
    mounted: PathBuf,
    device: PathBuf,
    /// Kept from map to map, as a session keeps it.
    known: RefCell<Disks>,
    /// The lowest and the highest sector that was read of each disk.
    seen: RefCell<BTreeMap<u32, (u64, u64)>>,
}

impl<'a> Volume<'a> {
    fn make(disks: &'a [WholeDisk; 2]) -> Result<Self> {
        let lower = create("lower", &format!("0 {} linear /dev/vdb {LOWER}", PIECE_1 + PIECE))?;
        let device = create(
            "volume",
            &format!(
                "0 {PIECE} linear /dev/vda1 {PIECE_0}\n{PIECE} {PIECE} linear {} {PIECE_1}",
                lower.display()
            ),
        )?;
        run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-b", "4096"]).arg(&device))?;
        let mounted = mount_ext4(&device, "/volume")?;
        let process = stand_in(&mounted)?;
        Ok(Self { disks, process, mounted, device, known: RefCell::default(), seen: RefCell::default() })
    }

    fn with<T>(&self, work: impl FnOnce(&Mounted<'_>) -> Result<T>) -> Result<T> {
        let read = |vdev, offset, length| {
            let disk = self.disks.iter().find(|disk| disk.vdev() == vdev).context("no such disk")?;
            let sector = offset / SECTOR;
            let mut seen = self.seen.borrow_mut();
            let (low, high) = seen.entry(disk.number.minor).or_insert((sector, sector));
            (*low, *high) = (sector.min(*low), sector.max(*high));
            disk.read(offset, length)
        };
        work(&Mounted { path: self.mounted.clone(), pid: self.process.id() as i32, read: &read })
    }

    /// The sectors of a disk that were read since this was last asked.
    fn seen(&self, disk: usize) -> Option<(u64, u64)> {
        self.seen.borrow_mut().remove(&self.disks[disk].number.minor)
    }

    /// A file that takes so much room that it lies on all pieces.
    fn large(&self, space: u32, pages: u32) -> Result<()> {
        self.with(|mounted| {
            let path = mounted.path(&format!("large{space}.ibd"));
            write_pages(&path, space, 0..pages, 0)?;
            self.check(mounted, space, &path, pages)
        })
    }

    fn check(&self, mounted: &Mounted<'_>, space: u32, path: &Path, pages: u32) -> Result<()> {
        let (spaces, mut known) = (mounted.spaces()?, self.known.borrow_mut());
        let mut map = StorageMap::new(&spaces, &mut known, DiskRule::Any);
        let (named, left_out) = mounted.check(&mut map, space, path)?;
        ensure!(named.len() == pages as usize, "{} of {pages} pages: {left_out:?}", named.len());
        Ok(())
    }

    fn of_two_pieces(&self) -> Result<()> {
        self.with(every_page_is_found_or_has_a_reason)?;
        self.large(20, 800)?;
        let (first, last) = self.seen(0).context("nothing lies on disk 0")?;
        let start: u64 = fs::read_to_string("/sys/class/block/vda1/start")?.trim().parse()?;
        let piece = start + PIECE_0..start + PIECE_0 + PIECE;
        ensure!(piece.contains(&first) && piece.contains(&last), "disk 0: {first} to {last}");
        let (first, last) = self.seen(1).context("nothing lies on disk 1")?;
        let piece = LOWER + PIECE_1..LOWER + PIECE_1 + PIECE;
        ensure!(piece.contains(&first) && piece.contains(&last), "disk 1: {first} to {last}");
        Ok(())
    }

    fn life(&self) -> Result<()> {
        self.with(a_map_made_anew_follows_the_files)
    }

    fn extended(&self) -> Result<()> {
        let table = dmsetup(&["table", "volume"], None)?;
        let longer = format!("{}\n{} {PIECE} linear /dev/vda1 {PIECE_2}", table.trim(), 2 * PIECE);
        reload("volume", &longer, || Ok(()))?;
        run(Command::new("/sbin/resize2fs").arg(&self.device))?;
        self.seen(0);
        self.large(21, 700)?;
        let (_, last) = self.seen(0).context("nothing lies on disk 0")?;
        ensure!(last > PIECE_2, "nothing lies on the new piece: {last}");
        Ok(())
    }

    fn moved(&self) -> Result<()> {
        let table = dmsetup(&["table", "volume"], None)?;
        let lines: Vec<&str> = table.trim().lines().collect();
        let second = format!("{PIECE} {PIECE} linear /dev/vdb {MOVED_TO}");
        let moved = [lines[0], &second, lines.get(2).context("it was not extended")?].join("\n");
        let disk = &self.disks[1];
        // Direct I/O wants multiples of 4096, so what stands around the piece is moved as well.
        let (from, to) = ((LOWER + PIECE_1) * SECTOR, MOVED_TO * SECTOR);
        ensure!(from.is_multiple_of(DIRECT as u64) && to.is_multiple_of(DIRECT as u64));
        reload("volume", &moved, || {
            for at in (0..PIECE * SECTOR).step_by(1 << 20) {
                let length = (PIECE * SECTOR - at).min(1 << 20) as usize;
                disk.write(to + at, &disk.read(from + at, length)?)?;
                // So that a map that still names the old place is found out.
                disk.write(from + at, &vec![0xee; length])?;
            }
            Ok(())
        })?;
        self.seen(1);
        self.with(|mounted| self.check(mounted, 20, &mounted.path("large20.ibd"), 800))?;
        let (first, last) = self.seen(1).context("nothing lies on disk 1")?;
        ensure!(first >= MOVED_TO && last < MOVED_TO + PIECE, "disk 1: {first} to {last}");
        Ok(())
    }
}

fn striped() -> Result<()> {
    let sectors = 32_768;
    let device = create("striped", &format!("0 {sectors} striped 2 128 /dev/vda1 196608 /dev/vdb 131072"))?;
    run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-b", "4096"]).arg(&device))?;
    let path = mount_ext4(&device, "/striped")?;
    let mut process = stand_in(&path)?;
    let read = |_, _, _| bail!("a striped volume is named");
    let mounted = Mounted { path, pid: process.id() as i32, read: &read };
    let file = mounted.path("t.ibd");
    write_pages(&file, 30, 0..16, 0)?;
    let (spaces, mut disks) = (mounted.spaces()?, Disks::default());
    let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    let (named, left_out) = mounted.check(&mut map, 30, &file)?;
    process.kill()?;
    process.wait()?;
    ensure!(named.is_empty() && left_out.len() == 16, "{named:?}");
    ensure!(left_out.iter().all(|(_, reason)| *reason == LeftOut::DmStriped), "{left_out:?}");
    Ok(())
}

/// Makes a volume; its device.
fn create(name: &str, table: &str) -> Result<PathBuf> {
    dmsetup(&["create", name], Some(table))?;
    for entry in fs::read_dir("/sys/block")? {
        let path = entry?.path();
        let is_it = fs::read_to_string(path.join("dm/name")).is_ok_and(|found| found.trim() == name);
        if let (true, Some(device)) = (is_it, path.file_name()) {
            let device = Path::new("/dev").join(device);
            wait_for_file(&device.to_string_lossy())?;
            return Ok(device);
        }
    }
    bail!("there is no volume {name}")
}

/// Gives a volume another table; `meanwhile` happens while it stands still.
fn reload(name: &str, table: &str, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    dmsetup(&["suspend", name], None)?;
    let done = meanwhile().and_then(|()| dmsetup(&["load", name], Some(table)));
    dmsetup(&["resume", name], None)?;
    done.map(drop)
}

fn dmsetup(words: &[&str], table: Option<&str>) -> Result<String> {
    let mut command = Command::new("/sbin/dmsetup");
    // There is no udev that could be waited for.
    command.args(words.first()).args(["--noudevsync", "--noudevrules"]).args(&words[1..]);
    if let Some(table) = table {
        let path = "/run/table";
        fs::write(path, table)?;
        command.arg(path);
    }
    run(&mut command)
}

fn mount_ext4(device: &Path, place: &str) -> Result<PathBuf> {
    fs::create_dir_all(place)?;
    mount(Some(device), place, Some("ext4"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount {}", device.display()))?;
    Ok(PathBuf::from(place))
}

fn stand_in(directory: &Path) -> io::Result<Child> {
    Command::new("/proc/self/exe").arg(STAND).current_dir(directory).spawn()
}
