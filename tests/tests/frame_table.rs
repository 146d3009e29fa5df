//! The frame table against a real mysqld under load, held against an independent reading of all its control blocks.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest_probe::event::EventKind;
use guest_probe::frame_table::{FrameAddr, FrameState};
use guest_probe::session::{Options, Session};
use guest_probe::storage_map::DiskRule;
use tests::server::{Server, wait_for};
use tests::truth::{Block, Memory};

fn options(server: &Server) -> Options {
    Options { pid: Some(server.pid()), rule: DiskRule::Any, ..Options::default() }
}

/// Which way a table and a control block differ.
#[derive(Debug, PartialEq, Eq)]
enum Difference {
    /// The table trusts a frame more than its block does. This must never be.
    TrustsMore,
    /// Both are on their way: the table trusts a frame less, or it has it as written while the block is taken off the flush list with its
    /// `io_fix` still set, by which the lists know better. This is so between the moments at which mysqld does a thing and at which it is told
    /// (`event.rs`), for as many frames as there are threads in between; it costs a hint and must pass.
    InBetween,
}

/// What the table has about a frame, against its control block.
fn difference(state: Option<FrameState>, block: &Block) -> Option<Difference> {
    let Some(state) = state else { return Some(Difference::InBetween) };
    let page = state.page().map(|page| (page.space, page.page));
    if !block.is_file_page || block.reading {
        // While a page is read its block says so, and the read's event may have come or not.
        return (state.is_clean() && !block.reading).then_some(Difference::TrustsMore);
    }
    match state {
        FrameState::Free => Some(Difference::InBetween),
        _ if page != Some(block.page) => Some(Difference::TrustsMore),
        FrameState::Dirty(_) => (!block.dirty).then_some(Difference::InBetween),
        FrameState::Written(_) if block.dirty && block.io_fix != 0 => Some(Difference::InBetween),
        FrameState::Read(_) | FrameState::Written(_) => block.dirty.then_some(Difference::TrustsMore),
    }
}

/// Frames in between; fails for one that the table trusts more than its block does, or that only one of both knows.
fn compare(session: &Session, memory: &Memory) -> Result<Vec<u64>> {
    let blocks = memory.control_blocks()?;
    ensure!(!blocks.is_empty());
    let in_table: Vec<u64> = session.table().iter().map(|(frame, _)| frame.0).collect();
    ensure!(
        in_table.iter().eq(blocks.keys()),
        "{} frames in the table, {} blocks",
        in_table.len(),
        blocks.len()
    );
    let mut between = Vec::new();
    for (frame, block) in &blocks {
        let state = session.table().get(FrameAddr(*frame));
        match difference(state, block) {
            None => {}
            Some(Difference::InBetween) => between.push(*frame),
            Some(Difference::TrustsMore) => {
                anyhow::bail!("frame {frame:#x}: the table has {state:?}, its control block {block:?}")
            }
        }
    }
    Ok(between)
}

fn count(session: &Session, kind: EventKind) -> u64 {
    session.events().get(&kind).copied().unwrap_or_default()
}

#[test]
fn the_table_agrees_with_every_control_block_under_load() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let load = server.load(4)?;
    // Late attach: the pool is in use when the probes come.
    wait_for("the load to fill the pool", || {
        let blocks = memory.control_blocks()?;
        let used = blocks.values().filter(|block| block.is_file_page).count();
        Ok(used * 10 > blocks.len() * 8)
    })?;
    let mut session = Session::start(&options(&server))?;
    let mut frames_compared = 0;
    let mut unsettled = Vec::new();
    let mut stops = 0;
    let start = Instant::now();
    while stops < 25 || count(&session, EventKind::Free) < 5_000 {
        ensure!(start.elapsed() < Duration::from_secs(600), "too few evictions: {:?}", session.events());
        for _ in 0..4 {
            sleep(Duration::from_millis(100));
            session.update()?;
        }
        let stopped = server.stop()?;
        session.update()?;
        let less = compare(&session, &memory)?;
        ensure!(less.len() <= 8, "{} frames at once are in between", less.len());
        for frame in &unsettled {
            ensure!(!less.contains(frame), "frame {frame:#x} stays in between");
        }
        unsettled = less;
        frames_compared += session.table().len();
        stops += 1;
        drop(stopped);
    }
    drop(load);
    let (snapshots, _) = session.snapshots();
    ensure!(snapshots == 1, "the table was kept by events alone, but {snapshots} snapshots were taken");
    ensure!(session.probes().missed()?.total() == 0);
    for kind in [EventKind::ReadComplete, EventKind::Dirty, EventKind::Clean, EventKind::Free] {
        ensure!(count(&session, kind) > 500, "{kind:?}: {:?}", session.events());
    }
    println!("{stops} stops, {frames_compared} frames compared, events {:?}", session.events());
    // At rest nothing is in between: all frames agree, both ways.
    wait_for("the server to come to rest", || {
        sleep(Duration::from_millis(300));
        let stopped = server.stop()?;
        session.update()?;
        let less = compare(&session, &memory)?;
        drop(stopped);
        Ok(less.is_empty())
    })
}

#[test]
fn a_pool_that_grows_and_shrinks_is_followed() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let mut session = Session::start(&options(&server))?;
    let before = session.table().len();
    let load = server.load(2)?;
    for (bytes, frames) in [(256_u64 << 20, 2 * before), (128 << 20, before)] {
        server.sql(&format!("SET GLOBAL innodb_buffer_pool_size={bytes}"))?;
        // A chunk whose memory does not begin at a multiple of the page size has one frame less.
        let chunks = bytes.div_ceil(32 << 20) as usize;
        wait_for("the pool to be resized", || {
            session.update()?;
            sleep(Duration::from_millis(50));
            Ok(session.table().len().abs_diff(frames) <= chunks)
        })
        .with_context(|| format!("{} frames in the table, {frames} wanted", session.table().len()))?;
        // What came while the pool changed is settled by a snapshot after it.
        let mut between = Vec::new();
        wait_for("the table to agree", || {
            sleep(Duration::from_millis(500));
            session.update()?;
            let stopped = server.stop()?;
            session.settle()?;
            between = compare(&session, &memory)?;
            drop(stopped);
            Ok(between.len() <= 4)
        })
        .with_context(|| format!("{} frames in between, {:?}", between.len(), session.events()))?;
    }
    drop(load);
    ensure!(count(&session, EventKind::Resize) > 0);
    Ok(())
}

#[test]
fn lost_events_force_a_new_snapshot() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    // Room for 128 events, and nobody takes them.
    let mut session = Session::start(&Options { ring_bytes: 4096, ..options(&server) })?;
    let load = server.load(4)?;
    wait_for("events to be lost", || Ok(session.probes().missed()?.lost > 1_000))?;
    drop(load);
    let (snapshots, _) = session.snapshots();
    // The server flushes on for a while, and so small a ring may lose events again.
    wait_for("the table to be whole again", || {
        session.settle()?;
        let stopped = server.stop()?;
        let missed = session.probes().missed()?;
        session.update()?;
        if missed != session.probes().missed()? || session.wants_snapshot() {
            return Ok(false);
        }
        let less = compare(&session, &memory)?;
        drop(stopped);
        Ok(less.len() <= 4)
    })?;
    ensure!(session.snapshots().0 > snapshots, "the loss was not noticed");
    Ok(())
}
