//! The storage map on real file systems, each on a partition of a loop device, in a mount namespace of the test's own thread. On volumes of the
//! device mapper it is tried by `volume-test`, in a kernel that has one.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use enlightenment::Vdev;
use guest_probe::disk::Disks;
use guest_probe::frame_table::PageId;
use guest_probe::left_out::LeftOut;
use guest_probe::process::MysqldProcess;
use guest_probe::spaces::Spaces;
use guest_probe::storage_map::{DiskRule, StorageMap};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tests::disk::{DISK_BYTES, Disk, run};
use tests::server::wait_for;
use tests::storage::{
    Mounted, ReadDisk, a_listing_that_the_kernel_ends_says_how_far_it_came,
    a_map_made_anew_follows_the_files, cached_pages_are_listed_where_they_lie,
    every_page_is_found_or_has_a_reason, write_pages,
};

/// A mounted file system on a partition of a loop device; it goes with the test's thread.
struct FileSystem {
    // Dropped first: it stands in the mount.
    process: Child,
    disk: Disk,
    mounted: PathBuf,
    _dir: tempfile::TempDir,
}

impl FileSystem {
    fn make(kind: &str, mkfs: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("poolskip-storage-").tempdir()?;
        let image = dir.path().join("disk.img");
        File::create(&image)?.set_len(DISK_BYTES)?;
        let disk = Disk::attach(&image)?;
        run(Command::new(format!("mkfs.{kind}")).args(mkfs).arg(&disk.partition))?;
        let mounted = dir.path().join("mounted");
        fs::create_dir(&mounted)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some(&disk.partition), &mounted, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind}"))?;
        let mut process = Command::new("sleep");
        process.arg("600").current_dir(&mounted).stdin(Stdio::null()).stdout(Stdio::null());
        let with_the_test = || {
            // SAFETY: a plain system call with integers.
            let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure makes one system call and allocates nothing.
        unsafe { process.pre_exec(with_the_test) };
        Ok(Self { process: process.spawn()?, disk, mounted, _dir: dir })
    }

    /// Reads its disk, which is the only one that a map may name.
    fn reader(&self) -> impl Fn(Vdev, u64, usize) -> Result<Vec<u8>> + '_ {
        |vdev, offset, length| {
            let (major, minor) = self.disk.number()?;
            ensure!(vdev.0 == major << 20 | minor, "another disk is named");
            self.disk.read(offset, length)
        }
    }

    fn mounted<'a>(&self, read: ReadDisk<'a>) -> Mounted<'a> {
        Mounted { path: self.mounted.clone(), pid: self.process.id() as i32, read }
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Err(error) = nix::mount::umount(&self.mounted) {
            eprintln!("{} stays mounted until the test's thread ends: {error}", self.mounted.display());
        }
    }
}

#[test]
fn ext4() -> Result<()> {
    let system = FileSystem::make("ext4", &["-q"])?;
    let read = system.reader();
    let mounted = system.mounted(&read);
    every_page_is_found_or_has_a_reason(&mounted)?;
    let (listed, of) = cached_pages_are_listed_where_they_lie(&mounted)?;
    ensure!(listed == of, "{listed} of {of} cached pages are listed");
    a_map_made_anew_follows_the_files(&mounted)
}

#[test]
fn a_listing_of_cached_pages_that_fails_half_way() -> Result<()> {
    let system = FileSystem::make("ext4", &["-q"])?;
    let read = system.reader();
    let mounted = system.mounted(&read);
    write_pages(&mounted.path("one.ibd"), 1, 0..2, 0)?;
    a_listing_that_the_kernel_ends_says_how_far_it_came(&mounted)
}

#[test]
fn ext4_with_small_blocks() -> Result<()> {
    let system = FileSystem::make("ext4", &["-q", "-b", "1024", "-O", "inline_data"])?;
    let read = system.reader();
    let mounted = system.mounted(&read);
    every_page_is_found_or_has_a_reason(&mounted)?;
    // Blocks of 1 KiB need not make whole pages.
    let (listed, of) = cached_pages_are_listed_where_they_lie(&mounted)?;
    ensure!(listed > 0 && listed <= of, "{listed} of {of} cached pages are listed");
    Ok(())
}

#[test]
fn xfs() -> Result<()> {
    let system = FileSystem::make("xfs", &["-q", "-f"])?;
    let read = system.reader();
    let mounted = system.mounted(&read);
    every_page_is_found_or_has_a_reason(&mounted)?;
    let (listed, of) = cached_pages_are_listed_where_they_lie(&mounted)?;
    ensure!(listed == of, "{listed} of {of} cached pages are listed");
    a_map_made_anew_follows_the_files(&mounted)
}

#[test]
fn a_reflinked_file_on_xfs_is_left_out_where_it_is_shared() -> Result<()> {
    let system = FileSystem::make("xfs", &["-q", "-f", "-m", "reflink=1"])?;
    let read = system.reader();
    let system = system.mounted(&read);
    let (original, copy) = (system.path("original.ibd"), system.path("copy.backup"));
    write_pages(&original, 5, 0..64, 0)?;
    run(Command::new("cp").arg("--reflink=always").args([&original, &copy]))?;
    let spaces = system.spaces()?;
    let mut disks = Disks::default();
    let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    let (named, left_out) = system.check(&mut map, 5, &original)?;
    ensure!(
        named.is_empty() && left_out.iter().all(|(_, reason)| *reason == LeftOut::Shared),
        "{left_out:?}"
    );
    // What is written goes to places of its own, which are named and right; XFS may give it a little more.
    write_pages(&original, 5, 16..32, 9)?;
    let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    let (named, left_out) = system.check(&mut map, 5, &original)?;
    ensure!((16..32).all(|page| named.contains(&page)), "{named:?}");
    ensure!(left_out.iter().all(|(_, reason)| *reason == LeftOut::Shared), "{left_out:?}");
    println!("{} of 64 pages are named, {} are shared", named.len(), left_out.len());
    // When the copy goes, nothing is shared any more.
    fs::remove_file(&copy)?;
    // XFS gives up a removed file's share some time later.
    wait_for("the original to share nothing", || {
        let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
        Ok(system.check(&mut map, 5, &original)?.0.len() == 64)
    })
}

#[test]
fn a_file_system_that_was_not_tried_is_left_out() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("poolskip-storage-").tempdir_in("/dev/shm")?;
    write_pages(&dir.path().join("t.ibd"), 6, 0..2, 0)?;
    let mut process = Command::new("sleep").arg("600").current_dir(dir.path()).spawn()?;
    let spaces = Spaces::scan(&MysqldProcess::find(Some(process.id() as i32))?);
    process.kill()?;
    process.wait()?;
    let (spaces, mut disks) = (spaces?, Disks::default());
    let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    let found = map.pieces(PageId { space: 6, page: 1 }, &mut Vec::new());
    ensure!(found == Err(LeftOut::NoDisk), "{found:?}");
    Ok(())
}
