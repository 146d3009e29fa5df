//! `guest-probe run` as a whole, with a test in the kernel module's place.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use enlightenment::xenstore::RequestKind;
use guest_probe::config::Mode;
use guest_probe::event::EventKind;
use guest_probe::exit::Exit;
use guest_probe::probes::Probes;
use guest_probe::process::Choice;
use guest_probe::service::{Ended, ServiceError, ServiceOptions};
use guest_probe::session::{Options, Session};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tests::kernel::{Held, INT3};
use tests::running::{Running, options};
use tests::server::{POOL_BYTES, Server, wait_for};
use tests::truth::{Memory, PAGE};

/// Where probes go in this build, relative to the load address.
fn places(server: &Server) -> Result<Vec<u64>> {
    let session = Session::start(&Options { pid: Some(server.pid()), ..Options::default() })?;
    Ok(session.probes().attached().iter().map(|attached| attached.place.address).collect())
}

fn first_bytes(memory: &Memory, places: &[u64]) -> Result<Vec<u8>> {
    places.iter().map(|place| Ok(memory.read_program(*place, 1)?[0])).collect()
}

fn only(server: &Server, mode: Mode) -> ServiceOptions {
    ServiceOptions { choice: Choice::One(server.pid()), ..options(mode, "".into()) }
}

#[test]
fn a_resident_probe_answers_and_ends_with_its_mysqld() -> Result<()> {
    let mut server = Server::start(&[])?;
    let running = Running::start(only(&server, Mode::Resident))?;
    server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?;
    for sequence in [41, 42] {
        running.tell(1, RequestKind::Begun)?;
        running.ask(sequence)?;
    }
    running.host.with(|state| -> Result<()> {
        let publish = state.publish.context("nothing is published")?;
        // At least one for each request: lists are built twice where a second look promises more.
        ensure!(publish.generation >= 2 && publish.generation == state.generation, "{publish:?}");
        ensure!(publish.frames_read > 1_000, "{publish:?}");
        ensure!(state.by_process.keys().eq([&server.pid()]));
        let frames = publish.frames_read + publish.frames_written;
        ensure!(frames * 100 > publish.pool_frames_clean * 90, "{publish:?}");
        let pages: u64 = state.runs.iter().map(|run| u64::from(run.pages)).sum();
        ensure!(pages == frames * 4, "{pages} pages, {publish:?}");
        Ok(())
    })?;
    wait_for("the status to show the answer", || Ok(running.status()?.answers == 2))?;
    let status = running.status()?;
    println!("{status}");
    let probed = status.servers.first().context("no server is probed")?;
    ensure!(probed.mysqld_pid == server.pid() && probed.events_lost == 0, "{status:?}");
    let answer = status.last_answer.as_ref().context("no answer")?;
    ensure!(answer.sequence == 42 && answer.servers == 1, "{answer:?}");
    let table = answer.tables.iter().find(|table| table.table == "sbtest/sbtest1");
    let table = table.with_context(|| format!("sbtest1 is not among the tables: {:?}", answer.tables))?;
    ensure!(table.coverage.frames_read > 1_000, "{table:?}");
    let by_table: u64 = answer.tables.iter().map(|table| table.coverage.frames()).sum();
    let lists = &answer.lists;
    let by_reason = lists.frames_read + lists.frames_written + lists.left_out.values().sum::<u64>();
    ensure!(by_table == by_reason, "{by_table} frames by table, {by_reason} by reason");
    let reads = probed.programs.iter().find(|program| program.name == "read_complete");
    ensure!(
        reads.is_some_and(|program| program.runs > 0 && program.nanoseconds > 0),
        "{:?}",
        probed.programs
    );
    ensure!(status.peak_memory_bytes > 0);
    guest_probe::watch::watch(running.socket(), Duration::from_millis(100), Some(2))?;
    // A second one is refused.
    let mut second = only(&server, Mode::Resident);
    second.config.socket = running.socket().to_path_buf();
    let (mut device, _host) = tests::fake_device::fake_device()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let refused = runtime.block_on(guest_probe::service::serve(second, &mut device));
    ensure!(matches!(refused, Err(ServiceError::Runs(_))), "{refused:?}");
    server.kill()?;
    let host = running.host.clone();
    let socket = running.socket().to_path_buf();
    let ended = running.join()??;
    ensure!(ended == Ended::MysqldGone);
    ensure!(host.with(|state| state.withdrawn == 1 && state.runs.is_empty()), "the lists stay published");
    ensure!(!socket.exists());
    Ok(())
}

#[test]
fn on_demand_nothing_is_attached_but_from_the_request_to_the_end() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let places = places(&server)?;
    let unprobed = || Ok(!first_bytes(&memory, &places)?.contains(&INT3));
    wait_for("the probes of a session that was dropped to go", unprobed)?;
    let before = first_bytes(&memory, &places)?;
    let running = Running::start(options(Mode::OnDemand, "".into()))?;
    let nothing_is_attached = || -> Result<()> {
        let status = running.status()?;
        ensure!(status.servers.is_empty(), "{status:?}");
        // The service runs in this process: what the kernel has of it is in our descriptors.
        let held = Held::by(std::process::id())?;
        ensure!(held.is_empty(), "{held:?}");
        ensure!(first_bytes(&memory, &places)? == before, "a probe is in mysqld");
        Ok(())
    };
    server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?;
    nothing_is_attached()?;
    for (begun, sequence) in [(1, 2), (4, 5)] {
        let publish = running.ask(sequence)?;
        ensure!(publish.frames_read > 1_000, "{publish:?}");
        running.tell(begun, RequestKind::Begun)?;
        ensure!(first_bytes(&memory, &places)?.iter().all(|byte| *byte == INT3), "probes are missing");
        let held = Held::by(std::process::id())?;
        ensure!(held.programs.len() == 7 && held.still_there() == held, "{held:?}");
        // It follows what happens while the migration runs.
        server.sql("SELECT COUNT(*) FROM sbtest.sbtest2 WHERE pad != ''")?;
        wait_for("events to arrive", || {
            let status = running.status()?;
            let reads = status.servers.first().and_then(|server| server.events.get("read").copied());
            Ok(reads.is_some_and(|reads| reads > 0))
        })?;
        running.tell(sequence + 1, RequestKind::Ended)?;
        wait_for("the probes to be taken out", || Ok(running.status()?.servers.is_empty()))?;
        wait_for("mysqld's code to be as before", || Ok(first_bytes(&memory, &places)? == before))?;
        ensure!(held.still_there().is_empty(), "{:?}", held.still_there());
        nothing_is_attached()?;
        ensure!(running.host.with(|state| state.publish.is_none()), "the lists stay published");
        // So that the second time has something to read.
        server.sql("SELECT COUNT(*) FROM sbtest.sbtest3 WHERE pad != ''; SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?;
    }
    Ok(())
}

#[test]
fn on_demand_probes_go_when_dom0_is_never_heard_of_again() -> Result<()> {
    let server = Server::start(&[])?;
    let mut options = options(Mode::OnDemand, "".into());
    options.config.detach_after_seconds = 3;
    let running = Running::start(options)?;
    running.ask(1)?;
    let held = Held::by(std::process::id())?;
    wait_for("the probes to be taken out", || Ok(held.still_there().is_empty()))?;
    // A migration may still be under way.
    ensure!(running.host.with(|state| state.publish.is_some()), "the lists are withdrawn");
    ensure!(running.ask(2)?.answers == 2, "a later request is not answered");
    drop(server);
    Ok(())
}

#[test]
fn metrics_are_served_on_the_loopback_and_written_to_a_file() -> Result<()> {
    let server = Server::start(&[])?;
    let dir = tempfile::tempdir()?;
    let mut options = only(&server, Mode::Resident);
    // A port that is free: it was just given out and let go.
    let address: SocketAddr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    options.config.metrics.listen = Some(address);
    options.config.metrics.textfile = Some(dir.path().join("poolskip.prom"));
    options.config.metrics.textfile_seconds = 1;
    let running = Running::start(options)?;
    running.ask(1)?;
    let get = |request: &str| -> Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    for line in ["HTTP/1.1 200 OK", "poolskip_attached_servers 1", "poolskip_answers_total 1"] {
        ensure!(answer.lines().any(|it| it == line), "{line} is not in {answer}");
    }
    ensure!(get("GET /secret HTTP/1.1\r\n\r\n")?.starts_with("HTTP/1.1 404"));
    let file = dir.path().join("poolskip.prom");
    wait_for("the file to have the answer", || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        Ok(text.contains("poolskip_answers_total 1\n"))
    })?;
    Ok(())
}

/// The most memory that a process ever had, in bytes.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[test]
fn a_killed_probe_leaves_nothing_attached_and_needs_no_btf() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let places = places(&server)?;
    ensure!(places.len() == 8);
    let bytes = || first_bytes(&memory, &places);
    wait_for("the probes of a session that was dropped to go", || Ok(!bytes()?.contains(&INT3)))?;
    let before = bytes()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_attach_and_wait"));
    command.arg(server.pid().to_string()).stdout(Stdio::piped());
    // A kernel without BTF will do.
    let hide_btf = || {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(none, "/sys/kernel/btf", Some("tmpfs"), MsFlags::empty(), none)?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(hide_btf) };
    let mut victim = command.spawn()?;
    let mut line = String::new();
    // It ends early when something fails.
    BufReader::new(victim.stdout.take().context("no output")?).read_line(&mut line)?;
    let attached = bytes()?;
    let memory_of_victim = peak_memory(victim.id());
    let held = Held::by(victim.id());
    victim.kill()?;
    victim.wait()?;
    ensure!(attached.iter().all(|byte| *byte == INT3), "the victim has not attached");
    ensure!(line.trim().parse::<u64>()? > 500, "with few capabilities {line} frames are listed");
    let held = held?;
    ensure!(held.programs.len() == 7 && !held.links.is_empty(), "{held:?}");
    // The promise is 32 MiB and 64 bytes a frame.
    let most = (32 << 20) + 64 * POOL_BYTES / PAGE as u64;
    let peak = memory_of_victim?;
    println!("peak memory of a probe: {peak} bytes");
    ensure!(peak < most, "a probe takes {peak} bytes of memory, {most} are promised");
    wait_for("the probes of the killed process to go", || Ok(bytes()? == before))?;
    wait_for("the kernel to forget its programs and links", || Ok(held.still_there().is_empty()))?;
    ensure!(server.sql("SELECT COUNT(*) FROM sbtest.sbtest1 WHERE pad != ''")?.trim() == "200000");
    Ok(())
}

#[test]
fn without_capabilities_nothing_is_attached_and_it_is_said() -> Result<()> {
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_attach_and_wait"));
    command.arg(server.pid().to_string());
    let nothing_may_be_done = || {
        // Up to the last one that the kernel knows.
        for capability in 0..64 {
            // SAFETY: a plain system call with integers.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
                break;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(nothing_may_be_done) };
    let output = command.output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    println!("{words}");
    ensure!(output.status.code() == Some(i32::from(Exit::NotPermitted as u8)), "{output:?}");
    ensure!(words.trim().lines().count() == 1 && words.contains("root"), "{words}");
    ensure!(!first_bytes(&memory, &places(&server)?)?.is_empty());
    Ok(())
}

/// What the eBPF programs have said, through the logger that they were given.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Ears;

impl log::Log for Ears {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        SAID.lock().unwrap_or_else(PoisonError::into_inner).push(format!(
            "{} {}",
            record.level(),
            record.args()
        ));
    }

    fn flush(&self) {}
}

#[test]
fn the_programs_say_what_they_miss_at_debug_level_only() -> Result<()> {
    log::set_boxed_logger(Box::new(Ears)).map_err(|_| anyhow!("there is a logger already"))?;
    log::set_max_level(log::LevelFilter::Debug);
    let of_programs = || {
        let said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().filter(|line| line.contains("no structure can be read")).cloned().collect::<Vec<_>>()
    };
    let server = Server::start(&[])?;
    let mut probed = guest_probe::session::Server::find(Some(server.pid()))?;
    // No structure is that large: where the programs look for the frame's address, nothing is mapped.
    probed.build.block.frame = u32::MAX as usize - 7;
    let hear = |probes: &mut Probes, table: u32| -> Result<Vec<String>> {
        let before = probes.missed()?.unreadable;
        server.sql(&format!("SELECT COUNT(*) FROM sbtest.sbtest{table} WHERE pad != ''"))?;
        let mut of_frames = 0;
        probes.drain(|kind, _| of_frames += u32::from(kind != EventKind::FileOpen));
        ensure!(of_frames == 0, "an event without its frame was sent");
        ensure!(probes.missed()?.unreadable > before, "nothing was missed");
        Ok(of_programs())
    };
    let mut quiet = probed.attach(1 << 20)?;
    ensure!(hear(&mut quiet, 1)?.is_empty(), "they speak although nobody wants to hear it");
    drop(quiet);
    let debug = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_writer(std::io::sink);
    let mut talking = tracing::subscriber::with_default(debug.finish(), || probed.attach(1 << 20))?;
    let said = hear(&mut talking, 2)?;
    ensure!(said.first().is_some_and(|line| line.starts_with("DEBUG ")), "{said:?}");
    Ok(())
}
