//! `guest-probe run` as a whole, with a test in the kernel module's place.

use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use enlightenment::device::Request;
use enlightenment::xenstore::RequestKind;
use guest_probe::service::{Ended, ServiceError, serve};
use guest_probe::session::{Options, Session};
use guest_probe::status::{self, Status};
use guest_probe::storage_map::DiskRule;
use tests::fake_device::{FakeHost, fake_device};
use tests::server::{POOL_BYTES, Server, wait_for};
use tests::truth::{Memory, PAGE};

fn run_service(
    options: Options,
    socket: PathBuf,
) -> Result<(FakeHost, thread::JoinHandle<Result<Ended, ServiceError>>)> {
    let (mut device, host) = fake_device()?;
    let service = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| ServiceError::System { what: "start", source })?;
        runtime.block_on(serve(&options, &mut device, &socket, true))
    });
    Ok((host, service))
}

fn snapshot_request(sequence: u64) -> Request {
    Request { sequence, kind: RequestKind::Snapshot as u32, reserved: 0 }
}

#[test]
fn a_request_is_answered_and_the_end_of_mysqld_is_noticed() -> Result<()> {
    let mut server = Server::start(&[])?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("run/probe.sock");
    let options = Options { pid: Some(server.pid()), rule: DiskRule::Any, ..Options::default() };
    let (host, service) = run_service(options, socket.clone())?;
    server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?;
    let asked = || -> Option<Status> { status::ask(&socket).ok() };
    wait_for("the service to answer", || Ok(asked().is_some()))?;
    for sequence in [41, 42] {
        host.request(Request { sequence: 1, kind: RequestKind::Begun as u32, reserved: 0 })?;
        host.request(snapshot_request(sequence))?;
        wait_for("the lists", || {
            Ok(host.with(|state| state.publish.is_some_and(|it| it.answers == sequence)))
        })?;
    }
    host.with(|state| -> Result<()> {
        let publish = state.publish.context("nothing is published")?;
        ensure!(publish.generation == 2, "{publish:?}");
        ensure!(publish.frames_read > 1_000, "{publish:?}");
        ensure!(state.pid == server.pid());
        let frames = publish.frames_read + publish.frames_written;
        ensure!(frames * 100 > publish.pool_frames_clean * 90, "{publish:?}");
        let pages: u64 = state.runs.iter().map(|run| u64::from(run.pages)).sum();
        ensure!(pages == frames * 4, "{pages} pages, {publish:?}");
        Ok(())
    })?;
    wait_for("the status to show the answer", || Ok(asked().is_some_and(|status| status.answers == 2)))?;
    let status = asked().context("no status")?;
    println!("{status}");
    ensure!(status.mysqld_pid == server.pid() && status.events_lost == 0, "{status:?}");
    ensure!(status.last_answer.as_ref().is_some_and(|answer| answer.sequence == 42), "{status:?}");
    let reads = status.programs.iter().find(|program| program.name == "read_complete");
    ensure!(
        reads.is_some_and(|program| program.runs > 0 && program.nanoseconds > 0),
        "{:?}",
        status.programs
    );
    ensure!(status.peak_memory_bytes > 0);
    // A second one is refused.
    let options = Options { pid: Some(server.pid()), rule: DiskRule::Any, ..Options::default() };
    let (_, second) = run_service(options, socket.clone())?;
    let refused = second.join().map_err(|_| anyhow::anyhow!("the second service panicked"))?;
    ensure!(matches!(refused, Err(ServiceError::Runs(_))), "{refused:?}");
    server.kill()?;
    let ended = service.join().map_err(|_| anyhow::anyhow!("the service panicked"))??;
    ensure!(ended == Ended::MysqldGone);
    ensure!(host.with(|state| state.withdrawn == 1 && state.runs.is_empty()), "the lists stay published");
    ensure!(!socket.exists());
    Ok(())
}

/// The most memory that a process ever had, in bytes.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[test]
fn a_killed_probe_leaves_nothing_attached() -> Result<()> {
    /// What the kernel writes over the first byte of a probed instruction.
    const INT3: u8 = 0xcc;
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let places: Vec<u64> = {
        let session = Session::start(&Options { pid: Some(server.pid()), ..Options::default() })?;
        session.probes().attached().iter().map(|attached| attached.place.address).collect()
    };
    ensure!(places.len() == 9);
    let bytes =
        || -> Result<Vec<u8>> { places.iter().map(|place| Ok(memory.read_program(*place, 1)?[0])).collect() };
    wait_for("the probes of a session that was dropped to go", || Ok(!bytes()?.contains(&INT3)))?;
    let before = bytes()?;
    let mut victim =
        Command::new(env!("CARGO_BIN_EXE_attach_and_wait")).arg(server.pid().to_string()).spawn()?;
    let attached = wait_for("the victim to attach", || Ok(bytes()?.iter().all(|byte| *byte == INT3)));
    let memory_of_victim = peak_memory(victim.id());
    victim.kill()?;
    victim.wait()?;
    attached?;
    // The promise is 32 MiB and 64 bytes a frame.
    let most = (32 << 20) + 64 * POOL_BYTES / PAGE as u64;
    let peak = memory_of_victim?;
    println!("peak memory of a probe: {peak} bytes");
    ensure!(peak < most, "a probe takes {peak} bytes of memory, {most} are promised");
    wait_for("the probes of the killed process to go", || Ok(bytes()? == before))?;
    ensure!(server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?.trim() == "200000");
    Ok(())
}
