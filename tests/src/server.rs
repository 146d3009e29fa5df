//! A real mysqld of Debian, run as a test needs it: in a mount namespace and a chroot of its own, its data directory on a partition of
//! a loop device.

use std::env;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::disk::{DISK_BYTES, Disk, run};

/// Bytes in the pool: smaller than the data, so that pages are evicted.
pub const POOL_BYTES: u64 = 128 << 20;
/// Tables that sysbench uses, and rows in each: about 190 MiB in all.
const TABLES: &str = "--tables=4";
const ROWS: &str = "--table-size=200000";
/// Raised when the image is filled in another way.
const TEMPLATE: u32 = 1;
/// The server's path in its root.
const MYSQLD: &str = "/usr/sbin/mysqld";
/// Generous: these machines are slow and shared.
const PATIENCE: Duration = Duration::from_secs(600);

/// One server at a time: they are for the processor and the disk to be busy with.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A running server. Its data is a copy of an image that is made once.
pub struct Server {
    // Dropped in this order: the server ends before its disk goes, and the next one starts last.
    child: Child,
    /// Holds the thread whose children live in a PID namespace of their own; it ends after the server.
    _namespace: Option<Namespace>,
    /// The disk that its data directory lies on.
    pub disk: Disk,
    place: Place,
    _dir: TempDir,
    /// None of a server that runs beside another one, which has it.
    _turn: Option<MutexGuard<'static, ()>>,
}

/// Where a server and its clients live.
#[derive(Clone)]
struct Place {
    root: PathBuf,
    /// Becomes `/run/mysqld`: the socket.
    run_dir: PathBuf,
    /// Becomes `/tmp`.
    tmp_dir: PathBuf,
}

impl Server {
    /// Starts a server with four warm-able tables of sysbench in the schema `sbtest`.
    ///
    /// # Errors
    /// When `POOLSKIP_MYSQL_ROOT` is not set, this is not root, or the server does not come up.
    pub fn start(more_args: &[&str]) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self::start_in(Some(turn), false, more_args)
    }

    /// Starts a server like [`Server::start`] in a PID namespace of its own, where it is process 1.
    ///
    /// # Errors
    /// Those of [`Server::start`].
    pub fn start_contained(more_args: &[&str]) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self::start_in(Some(turn), true, more_args)
    }

    /// Starts another server beside this one, on a disk of its own.
    ///
    /// # Errors
    /// Those of [`Server::start`].
    pub fn start_beside(&self, more_args: &[&str]) -> Result<Self> {
        Self::start_in(None, false, more_args)
    }

    fn start_in(turn: Option<MutexGuard<'static, ()>>, contained: bool, more_args: &[&str]) -> Result<Self> {
        let template = template()?;
        let dir = tempfile::Builder::new().prefix("poolskip-test-").tempdir()?;
        let image = dir.path().join("disk.img");
        run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(template).arg(&image))?;
        let disk = Disk::attach(&image)?;
        let place = Place::new(dir.path())?;
        let mut mysqld = place.mysqld(MYSQLD, &disk, more_args)?;
        let (child, namespace) = if contained {
            let (child, namespace) = Namespace::spawn(mysqld)?;
            (child, Some(namespace))
        } else {
            (mysqld.spawn()?, None)
        };
        let mut server = Self { child, _namespace: namespace, disk, place, _dir: dir, _turn: turn };
        server.wait_until_up()?;
        Ok(server)
    }

    /// Starts it anew on the same data once it has ended; `program` is its path in its root, or none for the one it began with.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&mut self, program: Option<&str>, more_args: &[&str]) -> Result<()> {
        self.child.wait()?;
        // The partition is free once the dead server's mounts are gone.
        let _ = fs::remove_file(self.place.run_dir.join("s.sock"));
        self.child = self.place.mysqld(program.unwrap_or(MYSQLD), &self.disk, more_args)?.spawn()?;
        self.wait_until_up()
    }

    /// Ends it as an administrator would.
    ///
    /// # Errors
    /// With the server's words.
    pub fn shut_down(&mut self) -> Result<()> {
        self.sql("SHUTDOWN")?;
        self.child.wait()?;
        Ok(())
    }

    /// Puts a copy of its program where its root has `/run/mysqld/mysqld`, with each of these byte strings replaced, all of the same
    /// length as before; returns that path.
    ///
    /// # Errors
    /// When one of them is not in the program.
    pub fn copy_of_program(&self, replaced: &[(&[u8], &[u8])]) -> Result<&'static str> {
        use std::os::unix::fs::PermissionsExt;
        let mut bytes = fs::read(self.place.root.join(MYSQLD.trim_start_matches('/')))?;
        for (from, to) in replaced {
            ensure!(from.len() == to.len(), "another length");
            let mut found = 0;
            let mut at = 0;
            while let Some(next) = find(&bytes[at..], from) {
                bytes[at + next..][..to.len()].copy_from_slice(to);
                at += next + to.len();
                found += 1;
            }
            ensure!(found > 0, "{:?} is not in mysqld", String::from_utf8_lossy(from));
        }
        let copy = self.place.run_dir.join("mysqld");
        fs::write(&copy, bytes)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok("/run/mysqld/mysqld")
    }

    /// The directory that is `/run/mysqld` in its root.
    pub fn run_dir(&self) -> &Path {
        &self.place.run_dir
    }

    /// Runs one of sysbench's workloads on its four tables; how many transactions a second it made.
    ///
    /// # Errors
    /// When it fails or says nothing that can be read.
    pub fn transactions_per_second(&self, workload: &Workload<'_>) -> Result<f64> {
        let Workload { name, threads, seed, length } = workload;
        let mut sysbench = self.place.sysbench(name)?;
        sysbench.args([&format!("--threads={threads}"), &format!("--rand-seed={seed}")]);
        match length {
            Length::Seconds(seconds) => sysbench.arg(format!("--time={seconds}")),
            Length::Transactions(count) => sysbench.args(["--time=0", &format!("--events={count}")]),
        };
        let words = run(sysbench.args(["--rand-type=uniform", "run"]))?;
        transactions(&words).with_context(|| format!("sysbench says no number of transactions:\n{words}"))
    }

    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Its socket, as a client outside its chroot reaches it.
    pub fn socket(&self) -> PathBuf {
        self.place.run_dir.join("s.sock")
    }

    /// Runs SQL and returns what it answers, one row a line.
    ///
    /// # Errors
    /// With the server's words.
    pub fn sql(&self, sql: &str) -> Result<String> {
        run(self.place.program("/usr/bin/mysql", None)?.args([
            "--no-defaults",
            "--user=root",
            "--socket=/run/mysqld/s.sock",
            "--batch",
            "--skip-column-names",
            "--execute",
            sql,
        ]))
    }

    /// Starts sysbench's oltp_read_write; it ends with what is returned.
    ///
    /// # Errors
    /// When it does not start.
    pub fn load(&self, threads: u32) -> Result<Load> {
        let mut sysbench = self.place.sysbench("oltp_read_write")?;
        // Errors of statements on tables that a test drops are the test's own; it ends with what is returned.
        sysbench.args([&format!("--threads={threads}"), "--time=7200", "--rand-type=uniform", "run"]);
        sysbench.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Load { child: sysbench.spawn()? })
    }

    /// Stops all its threads until what is returned is dropped.
    ///
    /// # Errors
    /// When they do not stop.
    pub fn stop(&self) -> Result<Stopped> {
        let pid = self.pid();
        kill(Pid::from_raw(pid), Signal::SIGSTOP)?;
        let stopped = Stopped { pid };
        wait_for("all threads of mysqld to stop", || {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                // A thread that just ended has no state any more.
                let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
                let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
                if state != Some('T') {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(stopped)
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                bail!("mysqld ended with {status}:\n{}", self.place.log());
            }
            if self.place.run_dir.join("s.sock").exists() && self.sql("SELECT 1").is_ok() {
                return Ok(());
            }
            sleep(Duration::from_millis(100));
        }
        bail!("mysqld was not up after {PATIENCE:?}:\n{}", self.place.log())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A stopped process dies of SIGKILL too. Its data is thrown away.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run of sysbench.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// Its name, as `oltp_read_only`.
    pub name: &'a str,
    /// Clients.
    pub threads: u32,
    /// Same seed, same rows; each client draws from a row of numbers of its own.
    pub seed: u32,
    /// How long it is.
    pub length: Length,
}

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// So many seconds.
    Seconds(u32),
    /// So many transactions, of all clients together.
    Transactions(u64),
}

/// A load on a server.
pub struct Load {
    child: Child,
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server whose threads are stopped.
pub struct Stopped {
    pid: i32,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGCONT);
    }
}

/// A thread whose children live in a PID namespace of their own. The namespace ends with its first process; the thread stays for
/// as long as that runs, since the process dies with the thread that started it.
struct Namespace {
    end: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Namespace {
    fn spawn(mut command: Command) -> Result<(Child, Self)> {
        let (child_to, child_from) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            let spawned = unshare(CloneFlags::CLONE_NEWPID).map_err(io::Error::from);
            let _ = child_to.send(spawned.and_then(|()| command.spawn()));
            // Until the sender is dropped.
            let _ = ended.recv();
        });
        let child = child_from.recv().map_err(|_| anyhow!("the thread that starts mysqld has ended"))??;
        Ok((child, Self { end: Some(end), thread: Some(thread) }))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// The rate in sysbench's line `transactions: 123 (45.6 per sec.)`.
fn transactions(words: &str) -> Option<f64> {
    let line = words.lines().find_map(|line| line.trim().strip_prefix("transactions:"))?;
    line.split('(').nth(1)?.split(' ').next()?.parse().ok()
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|byte| *byte == first) {
        if bytes[at + next..].starts_with(wanted) {
            return Some(at + next);
        }
        at += next + 1;
    }
    None
}

/// Waits until something holds.
///
/// # Errors
/// When it does not after ten minutes.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        if start.elapsed() > PATIENCE {
            bail!("waited {PATIENCE:?} in vain for {what}");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

impl Place {
    fn new(dir: &Path) -> Result<Self> {
        let root = env::var_os("POOLSKIP_MYSQL_ROOT").context(
            "POOLSKIP_MYSQL_ROOT is not set: this test needs an unpacked root with mysqld; `cargo xtask test` makes one",
        )?;
        let (run_dir, tmp_dir) = (dir.join("run"), dir.join("tmp"));
        fs::create_dir_all(&run_dir)?;
        fs::create_dir_all(&tmp_dir)?;
        Ok(Self { root: PathBuf::from(root), run_dir, tmp_dir })
    }

    fn mysqld(&self, program: &str, disk: &Disk, more_args: &[&str]) -> Result<Command> {
        let mut mysqld = self.program(program, Some(disk))?;
        mysqld.args([
            "--no-defaults",
            "--user=root",
            "--datadir=/var/lib/mysql/data",
            "--socket=/run/mysqld/s.sock",
            "--log-error=/run/mysqld/error.log",
            "--pid-file=/run/mysqld/mysqld.pid",
            "--skip-networking",
            "--mysqlx=OFF",
            "--skip-log-bin",
            "--secure-file-priv=",
            "--performance-schema=OFF",
            "--innodb-buffer-pool-load-at-startup=OFF",
            "--innodb-buffer-pool-dump-at-shutdown=OFF",
            "--innodb-buffer-pool-chunk-size=32M",
            "--innodb-redo-log-capacity=96M",
        ]);
        mysqld.arg(format!("--innodb-buffer-pool-size={POOL_BYTES}")).args(more_args);
        mysqld.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(mysqld)
    }

    fn sysbench(&self, workload: &str) -> Result<Command> {
        let mut sysbench = self.program("/usr/bin/sysbench", None)?;
        sysbench.args([workload, "--mysql-socket=/run/mysqld/s.sock", "--mysql-user=root"]);
        sysbench.args(["--mysql-db=sbtest", TABLES, ROWS]);
        Ok(sysbench)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.run_dir.join("error.log")).unwrap_or_default()
    }

    /// A program of the root, in a mount namespace of its own: what is mounted there goes when the program ends. It dies with
    /// the thread that starts it.
    fn program(&self, program: &str, disk: Option<&Disk>) -> Result<Command> {
        let c_string = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let root = c_string(&self.root)?;
        let mut mounts = vec![
            (
                c_string(&self.run_dir)?,
                c_string(&self.root.join("run/mysqld"))?,
                c"".to_owned(),
                libc::MS_BIND,
            ),
            (c_string(&self.tmp_dir)?, c_string(&self.root.join("tmp"))?, c"".to_owned(), libc::MS_BIND),
        ];
        if let Some(disk) = disk {
            let data = c_string(&self.root.join("var/lib/mysql"))?;
            mounts.push((c_string(&disk.partition)?, data, c"ext4".to_owned(), 0));
        }
        let mut command = Command::new(program);
        let enter = move || {
            let done = |result: libc::c_int| {
                if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            };
            // SAFETY: system calls on strings that were made before the fork and end with NUL.
            unsafe {
                done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                done(libc::unshare(libc::CLONE_NEWNS))?;
                let none = std::ptr::null();
                let private = libc::MS_REC | libc::MS_PRIVATE;
                done(libc::mount(none, c"/".as_ptr(), none, private, none.cast()))?;
                for (from, to, kind, flags) in &mounts {
                    done(libc::mount(from.as_ptr(), to.as_ptr(), kind.as_ptr(), *flags, none.cast()))?;
                }
                done(libc::chroot(root.as_ptr()))?;
                done(libc::chdir(c"/".as_ptr()))
            }
        };
        // SAFETY: `enter` makes system calls only and allocates nothing.
        unsafe { command.pre_exec(enter) };
        // Where temporary files are out here is no place in the root.
        command.stdin(Stdio::null()).env("HOME", "/tmp").env_remove("TMPDIR");
        Ok(command)
    }
}

/// An image with a server's data and sysbench's tables, made once and kept beside other things that tests make.
fn template() -> Result<PathBuf> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/poolskip-tests");
    fs::create_dir_all(&dir)?;
    let root = env::var_os("POOLSKIP_MYSQL_ROOT").context(
        "POOLSKIP_MYSQL_ROOT is not set: this test needs an unpacked root with mysqld; `cargo xtask test` makes one",
    )?;
    let version = fs::read_to_string(Path::new(&root).join("packages.txt"))?;
    let version = version.lines().find_map(|line| line.strip_prefix("mysql-server-core "));
    let version = version.context("the root's packages.txt names no mysql-server-core")?;
    let image = dir.join(format!("mysql-{version}-{TEMPLATE}.img"));
    let lock = File::create(image.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if image.exists() {
        return Ok(image);
    }
    let partial = image.with_extension("partial");
    File::create(&partial)?.set_len(DISK_BYTES)?;
    {
        let disk = Disk::attach(&partial)?;
        run(Command::new("mkfs.ext4")
            .args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(&disk.partition))?;
        fill(disk, &dir)?;
    }
    fs::rename(&partial, &image)?;
    Ok(image)
}

fn fill(disk: Disk, dir: &Path) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("fill-").tempdir_in(dir)?;
    let place = Place::new(dir.path())?;
    let status = place.mysqld(MYSQLD, &disk, &["--initialize-insecure"])?.status()?;
    if !status.success() {
        bail!("mysqld --initialize-insecure ended with {status}:\n{}", place.log());
    }
    let child = place.mysqld(MYSQLD, &disk, &["--innodb-buffer-pool-size=512M"])?.spawn()?;
    let mut server = FillingServer { child };
    wait_for("the new server", || {
        if let Some(status) = server.child.try_wait()? {
            bail!("mysqld ended with {status}:\n{}", place.log());
        }
        Ok(place.run_dir.join("s.sock").exists())
    })?;
    run(place.program("/usr/bin/mysql", None)?.args([
        "--no-defaults",
        "--user=root",
        "--socket=/run/mysqld/s.sock",
        "--execute=CREATE DATABASE sbtest",
    ]))?;
    run(place.sysbench("oltp_read_write")?.args(["--threads=2", "prepare"]))?;
    run(place.program("/usr/bin/mysql", None)?.args([
        "--no-defaults",
        "--user=root",
        "--socket=/run/mysqld/s.sock",
        "--execute=SHUTDOWN",
    ]))?;
    server.child.wait()?;
    drop(disk);
    Ok(())
}

struct FillingServer {
    child: Child,
}

impl Drop for FillingServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
