//! `guest-probe snapshot`: what the pool is like at this moment and what would be listed, without any probe.

use std::fmt;

use enlightenment::Vdev;
use serde::Serialize;

use crate::control_blocks::BlocksError;
use crate::coverage::{TableCoverage, by_table};
use crate::disk::{DiskPlace, Disks};
use crate::frame_table::FrameCounts;
use crate::lists::ListSummary;
use crate::session::{Server, SessionError};
use crate::spaces::Spaces;
use crate::status::write_coverage;
use crate::storage_map::{DiskRule, StorageMap};

/// A tablespace's file.
#[derive(Clone, Debug, Serialize)]
pub struct SpaceReport {
    /// The tablespace.
    pub space: u32,
    /// Its flags.
    pub flags: u32,
    /// Its file's name.
    pub file: String,
    /// The disk; none where the file lies on no disk of its own.
    pub disk: Option<DiskPlace>,
    /// The disk's number as a Xen device; none for any other disk.
    pub vdev: Option<u32>,
}

/// The pool at this moment.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The process.
    pub mysqld_pid: i32,
    /// The package of its build.
    pub mysqld_package: String,
    /// Its build id.
    pub mysqld_build_id: String,
    /// Frames by state.
    pub frames: FrameCounts,
    /// What would be listed, whatever disk it lies on.
    pub lists: ListSummary,
    /// The same by table, those with the most frames first.
    pub tables: Vec<TableCoverage>,
    /// Files by tablespace.
    pub spaces: Vec<SpaceReport>,
}

/// Looks at a running mysqld.
///
/// # Errors
/// [`SessionError`].
pub fn report(pid: Option<i32>) -> Result<Report, SessionError> {
    let server = Server::find(pid)?;
    let spaces = Spaces::scan(&server.process).map_err(SessionError::Spaces)?;
    let mut disks = Disks::default();
    let table = server.control_blocks()?.snapshot()?;
    let mut storage = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    let lists = server.build_lists(&table, &mut storage, |_| Ok::<(), BlocksError>(()))?;
    let mut files: Vec<SpaceReport> = spaces
        .iter()
        .map(|file| {
            let disk = disks.get(file.device).cloned();
            let vdev = disk.as_ref().and_then(|disk| disk.vdev).map(|Vdev(number)| number);
            SpaceReport {
                space: file.header.space,
                flags: file.header.flags.0,
                file: file.name.display().to_string(),
                disk,
                vdev,
            }
        })
        .collect();
    files.sort_by_key(|file| file.space);
    Ok(Report {
        mysqld_pid: server.process.pid,
        mysqld_package: server.build.package.clone(),
        mysqld_build_id: server.build.build_id.clone(),
        frames: table.counts(),
        tables: by_table(server.process.pid, &lists, &spaces),
        lists,
        spaces: files,
    })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mysqld      process {}, {}", self.mysqld_pid, self.mysqld_package)?;
        let FrameCounts { free, read, written, dirty } = self.frames;
        writeln!(f, "frames      {read} read, {written} written and flushed, {dirty} dirty, {free} free")?;
        let lists = &self.lists;
        writeln!(
            f,
            "as on disk  {} read and {} written frames of {} clean ones, {} guest pages in {} runs",
            lists.frames_read, lists.frames_written, lists.pool_frames_clean, lists.pages, lists.runs
        )?;
        write_coverage(f, lists, &self.tables)?;
        for file in &self.spaces {
            let place = match &file.disk {
                Some(disk) => format!("{} from byte {}", disk.name, disk.start),
                None => "no disk of its own".to_owned(),
            };
            writeln!(f, "tablespace  {}: {} on {place}", file.space, file.file)?;
        }
        Ok(())
    }
}
