//! The lists against the disk: what would be listed is byte for byte what lies at the place that is named, read from the whole disk.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use guest_probe::left_out::LeftOut;
use guest_probe::lists::ListSummary;
use guest_probe::session::{Options, Session};
use guest_probe::storage_map::DiskRule;
use tests::listed::{GUEST_PAGE, compare, lists};
use tests::server::{Server, wait_for};
use tests::truth::{Memory, PAGE};

fn start(server: &Server, rule: DiskRule) -> Result<Session> {
    Ok(Session::start(&Options { pid: Some(server.pid()), rule, ..Options::default() })?)
}

#[test]
fn listed_pages_are_what_lies_on_the_disk() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let load = server.load(4)?;
    let mut session = start(&server, DiskRule::Any)?;
    let mut pages = 0;
    let (mut read, mut written) = (0, 0);
    for _ in 0..10 {
        sleep(Duration::from_millis(1500));
        session.update()?;
        let stopped = server.stop()?;
        let (runs, summary) = lists(&mut session)?;
        let compared = compare(&runs, &server.disk, &memory)?;
        ensure!(compared == summary.pages, "{compared} pages in runs, {} counted", summary.pages);
        ensure!(runs.len() as u64 == summary.runs);
        pages += compared;
        read += summary.frames_read;
        written += summary.frames_written;
        let blocks = memory.control_blocks()?;
        ensure!(blocks.len() as u64 == summary.pool_frames);
        let clean =
            blocks.values().filter(|block| block.is_file_page && !block.dirty && block.io_fix == 0).count();
        ensure!(clean as u64 == summary.pool_frames_clean);
        let left_out: u64 = summary.left_out.values().sum();
        let with_page = blocks.values().filter(|block| block.is_file_page).count() as u64;
        ensure!(summary.frames_read + summary.frames_written + left_out == with_page, "{summary:?}");
        drop(stopped);
    }
    println!("{pages} guest pages compared, of {read} read and {written} written frames");
    ensure!(read > 1_000 && written > 1_000, "{read} read, {written} written");
    // On an idle pool nearly all clean frames are listed.
    drop(load);
    wait_for("at least 95 % of the clean frames to be listed", || {
        sleep(Duration::from_millis(500));
        let (_, summary) = lists(&mut session)?;
        let listed = summary.frames_read + summary.frames_written;
        Ok(listed * 100 >= summary.pool_frames_clean * 95)
    })
}

/// Lists all while the server stands still, and compares it with the disk.
fn listed_as_on_disk(server: &Server, memory: &Memory, session: &mut Session) -> Result<ListSummary> {
    let stopped = server.stop()?;
    let (runs, summary) = lists(session)?;
    compare(&runs, &server.disk, memory)?;
    drop(stopped);
    Ok(summary)
}

#[test]
fn what_is_not_on_disk_as_in_memory_is_left_out() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let mut session = start(&server, DiskRule::Any)?;
    // Incompressible and compressible alike, in each kind of table.
    let rows = "SELECT id, k, REPEAT(c, 3), pad FROM sbtest.sbtest1 LIMIT 4000";
    server.sql(&format!(
        "CREATE TABLE sbtest.packed (id INT PRIMARY KEY, k INT, c TEXT, pad CHAR(60)) ROW_FORMAT=COMPRESSED {rows}; \
         CREATE TABLE sbtest.holes (id INT PRIMARY KEY, k INT, c TEXT, pad CHAR(60)) COMPRESSION='zlib' {rows}; \
         CREATE TABLE sbtest.dropped (id INT PRIMARY KEY, k INT, c TEXT, pad CHAR(60)) {rows}; \
         CREATE TABLE sbtest.emptied (id INT PRIMARY KEY, k INT, c TEXT, pad CHAR(60)) {rows}; \
         CREATE TABLE sbtest.moved (id INT PRIMARY KEY, k INT, c TEXT, pad CHAR(60)) {rows}; \
         SET GLOBAL innodb_max_dirty_pages_pct_lwm=0; SET GLOBAL innodb_max_dirty_pages_pct=0;"
    ))?;
    wait_for("all pages to be flushed", || Ok(memory.control_blocks()?.values().all(|block| !block.dirty)))?;
    let all = listed_as_on_disk(&server, &memory, &mut session)?;
    for reason in [LeftOut::Compressed, LeftOut::Hole] {
        ensure!(all.left_out.contains_key(&reason), "{reason:?}: {:?}", all.left_out);
    }
    // The frames of a dropped and of an emptied table stay in the pool for a while.
    server.sql("DROP TABLE sbtest.dropped; TRUNCATE TABLE sbtest.emptied; RENAME TABLE sbtest.moved TO sbtest.moved_away")?;
    let after = listed_as_on_disk(&server, &memory, &mut session)?;
    println!("left out {:?}, after the drop {:?}", all.left_out, after.left_out);
    ensure!(after.left_out.contains_key(&LeftOut::Stale), "{:?}", after.left_out);
    // The renamed table's file is found again.
    wait_for("the renamed file to be found", || {
        let (_, summary) = lists(&mut session)?;
        Ok(!summary.left_out.contains_key(&LeftOut::FileGone))
    })
}

#[test]
fn disks_that_are_none_of_xen_s_are_not_published() -> Result<()> {
    let server = Server::start(&[])?;
    server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?;
    let mut session = start(&server, DiskRule::Xen)?;
    let (runs, summary) = lists(&mut session)?;
    ensure!(runs.is_empty() && summary.pages == 0, "{summary:?}");
    ensure!(summary.left_out.get(&LeftOut::NotXen).is_some_and(|count| *count > 1_000), "{summary:?}");
    Ok(())
}

#[test]
fn wrong_hints_are_wrong_but_keep_to_the_pool_s_memory() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?;
    let options =
        Options { pid: Some(server.pid()), rule: DiskRule::Any, wrong_hints: Some(7), ..Options::default() };
    let mut session = Session::start(&options)?;
    let (runs, _) = lists(&mut session)?;
    let blocks = memory.control_blocks()?;
    let mut wrong = 0;
    for run in &runs {
        let last = run.address + u64::from(run.pages - 1) * GUEST_PAGE as u64;
        for address in [run.address, last] {
            let frame = blocks.range(..=address).next_back().map(|(frame, _)| *frame);
            ensure!(frame.is_some_and(|frame| address - frame < PAGE as u64), "{run:?} is outside the pool");
        }
        let length = usize::from(run.pages) * GUEST_PAGE;
        let on_disk = server.disk.read(run.disk_offset, length);
        let same =
            on_disk.is_ok_and(|bytes| memory.read(run.address, length).is_ok_and(|frame| frame == bytes));
        wrong += u64::from(!same);
    }
    println!("{wrong} of {} runs are wrong", runs.len());
    ensure!(wrong * 10 > runs.len() as u64, "{wrong} of {} runs are wrong", runs.len());
    ensure!(session.hints_made_wrong() > 0);
    Ok(())
}
