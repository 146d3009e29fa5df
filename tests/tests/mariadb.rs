//! The doctor on a running MariaDB of Debian 12: it says what can be found out without any name, what is missing, and lists nothing.
//!
//! Needs root and `POOLSKIP_MARIADB_ROOT`, an unpacked root with mariadbd; `cargo xtask test` makes one and sets it.

use std::env;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use guest_probe::catalogue::Catalogue;
use guest_probe::doctor::{self, DoctorError, Subject};
use tests::disk::run;
use tests::server::wait_for;

/// A running server; it ends with the test.
struct MariaDb {
    child: Child,
    _dir: tempfile::TempDir,
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program of the root in a mount namespace of its own, with the test's directories for its data and its socket. It dies with the
/// thread that starts it.
fn program(root: &Path, dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$2/data\" \"$1/var/lib/mysql\" && mount --bind \"$2/run\" \"$1/run/mysqld\" && \
                  mount --bind \"$2/tmp\" \"$1/tmp\" && mount --bind \"$2/etc\" \"$1/etc\" && \
                  root=$1 && shift 2 && exec chroot \"$root\" \"$@\"";
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
        .arg(root)
        .arg(dir)
        .args(arguments);
    command.stdin(Stdio::null()).env("HOME", "/tmp");
    let with_the_test = || {
        // SAFETY: a plain system call with integers.
        let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(with_the_test) };
    command
}

fn start() -> Result<MariaDb> {
    let root = PathBuf::from(env::var_os("POOLSKIP_MARIADB_ROOT").context(
        "POOLSKIP_MARIADB_ROOT is not set: this test needs an unpacked root with mariadbd; `cargo xtask test` makes one",
    )?);
    let dir = tempfile::Builder::new().prefix("poolskip-mariadb-").tempdir()?;
    for sub in ["data", "run", "tmp", "etc"] {
        fs::create_dir(dir.path().join(sub))?;
    }
    // The packages were only unpacked, so the root knows no user and no host.
    for (name, text) in [
        ("passwd", "root:x:0:0::/:/bin/bash\n"),
        ("group", "root:x:0:\n"),
        ("hosts", "127.0.0.1 localhost\n"),
    ] {
        fs::write(dir.path().join("etc").join(name), text)?;
    }
    run(&mut program(
        &root,
        dir.path(),
        &[
            // A script for /bin/sh, which this root has not.
            "/bin/bash",
            "/usr/bin/mariadb-install-db",
            "--no-defaults",
            "--user=root",
            "--basedir=/usr",
            "--datadir=/var/lib/mysql",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            // No name server is asked for this machine's name.
            "--force",
        ],
    ))?;
    let mut server = program(
        &root,
        dir.path(),
        &[
            "/usr/sbin/mariadbd",
            "--no-defaults",
            "--user=root",
            "--datadir=/var/lib/mysql",
            "--socket=/run/mysqld/s.sock",
            "--log-error=/run/mysqld/error.log",
            "--skip-networking",
        ],
    );
    let child = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let mut server = MariaDb { child, _dir: dir };
    let run_dir = server._dir.path().join("run");
    wait_for("mariadbd to come up", || {
        if let Some(status) = server.child.try_wait()? {
            bail!(
                "mariadbd ended with {status}:\n{}",
                fs::read_to_string(run_dir.join("error.log")).unwrap_or_default()
            );
        }
        Ok(run_dir.join("s.sock").exists())
    })?;
    Ok(server)
}

#[test]
fn mariadb_is_explained_and_nothing_is_listed() -> Result<()> {
    let server = start()?;
    let subject = Subject::Process(Some(server.child.id() as i32));
    let report = doctor::look(&subject, &Catalogue::built_in()?, Path::new("/nonexistent"))?;
    println!("{report}");
    ensure!(report.program.ends_with("/usr/sbin/mariadbd"), "{}", report.program);
    ensure!(report.package.is_none() && report.lists.is_none() && !report.is_usable());
    let found = report.mariadb_read_completion.context("its read completion was not found")?;
    ensure!(found.address < found.reference && found.cheap, "{found:?}");
    ensure!(
        report.missing.iter().any(|sentence| sentence.contains("this is MariaDB")),
        "{:?}",
        report.missing
    );
    ensure!(report.symbols.iter().all(|symbol| symbol.doubt.is_some()));
    ensure!(report.files.iter().any(|file| file.file.ends_with("/ibdata1")), "{:?}", report.files);
    let Err(DoctorError::NotSure(missing)) = doctor::make_entry(&subject) else { bail!("an entry was made") };
    ensure!(missing.iter().any(|sentence| sentence.contains("buf_pool_ptr")), "{missing:?}");
    Ok(())
}
