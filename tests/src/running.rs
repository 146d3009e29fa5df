//! `guest-probe run` on a thread, with a test in the kernel module's place.

use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use enlightenment::device::{Publish, Request};
use enlightenment::xenstore::RequestKind;
use guest_probe::config::{Config, Mode};
use guest_probe::process::Choice;
use guest_probe::service::{Ended, ServiceError, ServiceOptions, serve};
use guest_probe::session::Options;
use guest_probe::status::{self, Status};
use guest_probe::storage_map::DiskRule;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::fake_device::{FakeHost, fake_device};
use crate::server::wait_for;

/// A running service. It ends when this is dropped, by a signal, which is told to all services of this process: there may be one only.
pub struct Running {
    /// dom0, as it were.
    pub host: FakeHost,
    socket: PathBuf,
    thread: Option<JoinHandle<Result<Ended, ServiceError>>>,
    _dir: TempDir,
}

/// A service's options for a test: any disk will do, and of all mysqlds on this machine only those that the test started are meant.
pub fn options(mode: Mode, socket: PathBuf) -> ServiceOptions {
    let config = Config { mode, socket, statistics: true, ..Config::default() };
    let session = Options { rule: DiskRule::Any, ..config.options() };
    ServiceOptions { session, choice: Choice::ChildrenOf(std::process::id() as i32), config }
}

impl Running {
    /// Starts one with these options but for the socket, which is its own, and waits until it answers or has ended.
    ///
    /// # Errors
    /// When it cannot be started, or does not answer.
    pub fn start(mut options: ServiceOptions) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("run/probe.sock");
        options.config.socket = socket.clone();
        let (mut device, host) = fake_device()?;
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|source| ServiceError::System { what: "start", source })?;
            runtime.block_on(serve(options, &mut device))
        });
        let running = Self { host, socket, thread: Some(thread), _dir: dir };
        wait_for("the service to answer or to end", || Ok(running.has_ended() || running.status().is_ok()))?;
        Ok(running)
    }

    /// Its status.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Status> {
        Ok(status::ask(&self.socket)?)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks something.
    ///
    /// # Errors
    /// When it has ended.
    pub fn tell(&self, sequence: u64, kind: RequestKind) -> Result<()> {
        Ok(self.host.request(Request { sequence, kind: kind as u32, reserved: 0 })?)
    }

    /// Asks for lists and waits for them.
    ///
    /// # Errors
    /// When they do not come.
    pub fn ask(&self, sequence: u64) -> Result<Publish> {
        self.tell(sequence, RequestKind::Snapshot)?;
        let answer = || self.host.with(|state| state.publish.filter(|it| it.answers == sequence));
        wait_for("the lists", || Ok(answer().is_some() || self.has_ended()))?;
        answer().context("the service has ended")
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it as an operator would, by a signal, and waits.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub fn end(self) -> Result<()> {
        kill(Pid::this(), Signal::SIGTERM)?;
        match self.join()?? {
            Ended::BySignal => Ok(()),
            Ended::MysqldGone => Err(anyhow!("mysqld has ended")),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it panicked.
    pub fn join(mut self) -> Result<Result<Ended, ServiceError>> {
        let thread = self.thread.take().context("it was waited for already")?;
        thread.join().map_err(|_| anyhow!("the service panicked"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take().filter(|thread| !thread.is_finished()) {
            // It has answered, so it waits for signals: this does not end the process.
            let _ = kill(Pid::this(), Signal::SIGTERM);
            let _ = thread.join();
        }
    }
}
