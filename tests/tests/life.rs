//! Servers that come, go and change under a running `guest-probe run`; at the end of each story the listed frames are compared with the
//! disk.

use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use enlightenment::device::UserRun;
use guest_probe::config::Mode;
use guest_probe::session::{Options, Session};
use guest_probe::status::Status;
use guest_probe::storage_map::DiskRule;
use tests::listed::{compare, could_be_listed, lists};
use tests::running::{Running, options};
use tests::server::{Server, wait_for};
use tests::truth::Memory;

/// Fills a part of the pool.
const WARM: &str = "SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''";

fn status_with(running: &Running, what: &str, holds: impl Fn(&Status) -> bool) -> Result<Status> {
    wait_for(what, || Ok(holds(&running.status()?)))?;
    running.status()
}

fn probed(status: &Status, pid: i32) -> bool {
    status.servers.iter().any(|server| server.mysqld_pid == pid)
}

/// Asks for lists while the server stands still, and compares its part of them with its disk; returns the guest pages.
fn ask_and_compare(running: &Running, sequence: u64, server: &Server) -> Result<u64> {
    let memory = Memory::open(server.pid())?;
    let stopped = server.stop()?;
    running.ask(sequence)?;
    let runs: Vec<UserRun> =
        running.host.with(|state| state.by_process.get(&server.pid()).cloned()).unwrap_or_default();
    let pages = compare(&runs, &server.disk, &memory)?;
    drop(stopped);
    Ok(pages)
}

#[test]
fn a_server_that_starts_later_ends_and_starts_again_is_followed() -> Result<()> {
    let mut server = Server::start(&[])?;
    server.shut_down()?;
    let running = Running::start(options(Mode::Resident, PathBuf::new()))?;
    ensure!(running.status()?.servers.is_empty());
    // A request while no server runs is answered: dom0 need not wait.
    let publish = running.ask(1)?;
    ensure!(publish.pool_frames == 0, "{publish:?}");
    server.start_again(None, &[])?;
    status_with(&running, "the new server to be probed", |status| probed(status, server.pid()))?;
    server.sql(WARM)?;
    let pages = ask_and_compare(&running, 2, &server)?;
    ensure!(pages > 4_000, "{pages} pages");
    // Killed in the middle of its work.
    let load = server.load(4)?;
    let dead = server.pid();
    status_with(&running, "some work", |status| {
        status.servers.iter().any(|server| server.events.get("dirty").is_some_and(|count| *count > 100))
    })?;
    server.kill()?;
    drop(load);
    status_with(&running, "its end to be noticed", |status| !probed(status, dead))?;
    ensure!(running.host.with(|state| state.publish.is_none()), "the lists of a dead server stay published");
    // It comes back with crash recovery, and is probed from early on.
    server.start_again(None, &[])?;
    status_with(&running, "its successor to be probed", |status| probed(status, server.pid()))?;
    server.sql(WARM)?;
    let pages = ask_and_compare(&running, 3, &server)?;
    ensure!(pages > 4_000, "{pages} pages");
    server.shut_down()?;
    status_with(&running, "its end to be noticed", |status| status.servers.is_empty())?;
    Ok(())
}

#[test]
fn another_program_under_the_same_name_is_judged_anew() -> Result<()> {
    let mut server = Server::start(&[])?;
    let running = Running::start(options(Mode::Resident, PathBuf::new()))?;
    status_with(&running, "the server to be probed", |status| probed(status, server.pid()))?;
    // Upgraded to a build that nobody knows: another build id, and the pools under another name.
    let build_id: [u8; 20] = [
        0xcc, 0x8a, 0x18, 0x82, 0x63, 0x85, 0xd7, 0x18, 0x27, 0x61, 0xa4, 0xa8, 0xf4, 0x10, 0x44, 0x74, 0x82,
        0x67, 0x24, 0x4d,
    ];
    let mut other_id = build_id;
    other_id[0] = 0xee;
    server.shut_down()?;
    let program =
        server.copy_of_program(&[(&build_id, &other_id), (b"buf_pool_ptr\0", b"buf_pool_ptX\0")])?;
    server.start_again(Some(program), &[])?;
    let status = status_with(&running, "the unknown build to be refused", |status| {
        status.refused.iter().any(|refused| refused.mysqld_pid == server.pid())
    })?;
    ensure!(status.servers.is_empty() && status.refused[0].is_final, "{status}");
    ensure!(!status.refused[0].why.is_empty());
    server.sql(WARM)?;
    let publish = running.ask(1)?;
    ensure!(publish.pool_frames == 0 && publish.frames_read == 0, "{publish:?}");
    // And to one that is known, whose file is replaced while it runs.
    server.shut_down()?;
    let program = server.copy_of_program(&[])?;
    server.start_again(Some(program), &[])?;
    fs::remove_file(server.run_dir().join("mysqld"))?;
    let status =
        status_with(&running, "the known build to be probed", |status| probed(status, server.pid()))?;
    ensure!(status.refused.is_empty(), "{status}");
    server.sql(WARM)?;
    let pages = ask_and_compare(&running, 2, &server)?;
    ensure!(pages > 4_000, "{pages} pages");
    Ok(())
}

#[test]
fn several_servers_are_in_one_generation() -> Result<()> {
    let one = Server::start(&[])?;
    let mut other = one.start_beside(&[])?;
    let running = Running::start(options(Mode::OnDemand, PathBuf::new()))?;
    one.sql(WARM)?;
    other.sql(WARM)?;
    for (sequence, server) in [(1, &one), (2, &other)] {
        let pages = ask_and_compare(&running, sequence, server)?;
        ensure!(pages > 4_000, "{pages} pages");
        let of = running.host.with(|state| state.by_process.keys().copied().collect::<Vec<_>>());
        ensure!(of.len() == 2, "{of:?}");
        // The programs' own files are in memory, beside the pools.
        ensure!(running.host.with(|state| !state.cached.is_empty()), "no cached page of a file is listed");
    }
    let status = running.status()?;
    println!("{status}");
    ensure!(status.servers.len() == 2 && status.last_answer.is_some_and(|answer| answer.servers == 2));
    // One is killed as it is asked: the other one's frames are published all the same.
    other.kill()?;
    let publish = running.ask(3)?;
    let of = running.host.with(|state| state.by_process.keys().copied().collect::<Vec<_>>());
    ensure!(of == [one.pid()] && publish.frames_read > 1_000, "{of:?} {publish:?}");
    ask_and_compare(&running, 4, &one)?;
    Ok(())
}

#[test]
fn a_server_in_a_container_is_known_by_its_own_paths() -> Result<()> {
    let server = Server::start_contained(&[])?;
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:")).context("no NSpid")?;
    ensure!(
        inside.split_whitespace().last() == Some("1"),
        "it is not in a PID namespace of its own: {inside}"
    );
    let running = Running::start(options(Mode::OnDemand, PathBuf::new()))?;
    server.sql(WARM)?;
    let pages = ask_and_compare(&running, 1, &server)?;
    ensure!(pages > 4_000, "{pages} pages");
    let answer = running.status()?.last_answer.context("no answer")?;
    ensure!(answer.tables.iter().any(|table| table.table == "sbtest/sbtest1"), "{:?}", answer.tables);
    Ok(())
}

fn start_session(server: &Server) -> Result<Session> {
    Ok(Session::start(&Options { pid: Some(server.pid()), rule: DiskRule::Any, ..Options::default() })?)
}

/// Compares the lists with the disk until nearly all frames that could be listed are.
fn all_are_listed(session: &mut Session, server: &Server) -> Result<()> {
    let memory = Memory::open(server.pid())?;
    wait_for("at least 95 % of what could be listed to be", || {
        session.update()?;
        let stopped = server.stop()?;
        let (runs, summary) = lists(session)?;
        compare(&runs, &server.disk, &memory)?;
        let could = could_be_listed(&memory.control_blocks()?, &summary);
        drop(stopped);
        let listed = summary.frames_read + summary.frames_written;
        println!("{listed} of {could} frames: {:?}", summary.left_out);
        Ok(could > 1_000 && listed * 100 >= could * 95)
    })
}

#[test]
fn lists_are_right_through_a_resize_of_the_pool() -> Result<()> {
    let server = Server::start(&[])?;
    let mut session = start_session(&server)?;
    let load = server.load(2)?;
    let frames = session.table().len();
    for (mib, frames) in [(256, 2 * frames), (128, frames)] {
        server.sql(&format!("SET GLOBAL innodb_buffer_pool_size={}", mib << 20))?;
        wait_for("the pool to be resized", || {
            session.update()?;
            thread::sleep(std::time::Duration::from_millis(50));
            Ok(session.table().len() == frames)
        })?;
        all_are_listed(&mut session, &server)?;
    }
    drop(load);
    Ok(())
}

#[test]
fn imported_tables_and_truncated_undo_tablespaces_are_known() -> Result<()> {
    let server = Server::start(&["--innodb-max-dirty-pages-pct=0", "--innodb-max-dirty-pages-pct-lwm=0"])?;
    let mut session = start_session(&server)?;
    let data = PathBuf::from(format!("/proc/{}/root/var/lib/mysql/data/sbtest", server.pid()));
    server.sql(
        "CREATE TABLE sbtest.source AS SELECT id, k, c, pad FROM sbtest.sbtest1 LIMIT 40000; \
         CREATE TABLE sbtest.target LIKE sbtest.source; ALTER TABLE sbtest.target DISCARD TABLESPACE",
    )?;
    // The files may be copied for as long as the session that exports them lives.
    thread::scope(|scope| -> Result<()> {
        let export = scope.spawn(|| server.sql("FLUSH TABLES sbtest.source FOR EXPORT; SELECT SLEEP(600)"));
        let copied = wait_for("the export", || Ok(export.is_finished() || data.join("source.cfg").exists()))
            .and_then(|()| {
                for kind in ["ibd", "cfg"] {
                    let (from, to) = (data.join("source"), data.join("target"));
                    fs::copy(from.with_extension(kind), to.with_extension(kind))?;
                }
                Ok(())
            });
        wait_for("the exporting session to be found", || {
            let kill = server.sql(
                "SELECT CONCAT('KILL ', id) FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'",
            )?;
            Ok(export.is_finished() || (!kill.trim().is_empty() && server.sql(kill.trim()).is_ok()))
        })?;
        // It ends with an error: it was killed.
        let _ = export.join().map_err(|_| anyhow!("the export panicked"))?;
        copied
    })?;
    server.sql("ALTER TABLE sbtest.target IMPORT TABLESPACE")?;
    let rows = server.sql("SELECT COUNT(*) FROM sbtest.target WHERE pad != ''")?;
    ensure!(rows.trim() == "40000", "{rows} rows were imported");
    let listed_of = |session: &mut Session, table: &str| -> Result<u64> {
        let (_, summary) = lists(session)?;
        let tables = session.by_table(&summary);
        let of = tables.iter().find(|it| it.table == table);
        Ok(of.map_or(0, |table| table.coverage.frames_read + table.coverage.frames_written))
    };
    wait_for("the imported table to be listed", || Ok(listed_of(&mut session, "sbtest/target")? > 500))?;
    // An undo tablespace is emptied and made anew, under the same name and with another id.
    server.sql(
        "CREATE UNDO TABLESPACE more ADD DATAFILE 'more.ibu'; DELETE FROM sbtest.source WHERE id % 2 = 0",
    )?;
    server.sql("ALTER UNDO TABLESPACE innodb_undo_001 SET INACTIVE")?;
    wait_for("the undo tablespace to be emptied", || {
        let state = server
            .sql("SELECT state FROM information_schema.innodb_tablespaces WHERE name = 'innodb_undo_001'")?;
        Ok(state.trim() == "empty")
    })?;
    server.sql(
        "ALTER UNDO TABLESPACE innodb_undo_001 SET ACTIVE; DELETE FROM sbtest.target WHERE id % 3 = 0",
    )?;
    server.sql("DROP TABLE sbtest.source; TRUNCATE TABLE sbtest.sbtest4")?;
    all_are_listed(&mut session, &server)
}
