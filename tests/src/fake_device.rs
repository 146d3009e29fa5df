//! A device in the kernel module's place: remembers what was published, hands out the requests of a test.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, PoisonError};

use enlightenment::device::{Publish, Request, Stats, UserRun};
use guest_probe::device::{Device, DeviceError, Translated};

/// What the module would hold.
#[derive(Default)]
pub struct Published {
    /// Generations begun so far.
    pub generation: u64,
    /// The runs that were published last, of all processes.
    pub runs: Vec<UserRun>,
    /// The same by process.
    pub by_process: BTreeMap<i32, Vec<UserRun>>,
    /// Runs of cached files, which the probe lists by its own addresses.
    pub cached: Vec<UserRun>,
    /// With what.
    pub publish: Option<Publish>,
    /// How often they were withdrawn.
    pub withdrawn: u64,
    adding: BTreeMap<i32, Vec<UserRun>>,
    requests: VecDeque<Request>,
}

/// The device.
pub struct FakeDevice {
    state: Arc<Mutex<Published>>,
    wake: UnixDatagram,
}

/// The other side of it.
#[derive(Clone)]
pub struct FakeHost {
    state: Arc<Mutex<Published>>,
    wake: Arc<UnixDatagram>,
}

/// A device and its other side.
///
/// # Errors
/// When there are no descriptors left.
pub fn fake_device() -> io::Result<(FakeDevice, FakeHost)> {
    let (wake, host_wake) = UnixDatagram::pair()?;
    wake.set_nonblocking(true)?;
    let state = Arc::new(Mutex::new(Published::default()));
    Ok((FakeDevice { state: Arc::clone(&state), wake }, FakeHost { state, wake: Arc::new(host_wake) }))
}

impl FakeHost {
    /// Asks for something.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn request(&self, request: Request) -> io::Result<()> {
        self.with(|state| state.requests.push_back(request));
        self.wake.send(&[1]).map(drop)
    }

    /// Looks at what was published.
    pub fn with<T>(&self, look: impl FnOnce(&mut Published) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl FakeDevice {
    fn with<T>(&self, look: impl FnOnce(&mut Published) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for FakeDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn stale() -> DeviceError {
    DeviceError::Call { what: "add runs", source: io::Error::from_raw_os_error(libc::ESTALE) }
}

impl Device for FakeDevice {
    fn begin(&mut self) -> Result<u64, DeviceError> {
        Ok(self.with(|state| {
            state.adding.clear();
            state.generation += 1;
            state.generation
        }))
    }

    fn add(&mut self, generation: u64, pid: i32, runs: &[UserRun]) -> Result<Translated, DeviceError> {
        self.with(|state| {
            if generation != state.generation {
                return Err(stale());
            }
            state.adding.entry(pid).or_default().extend_from_slice(runs);
            let listed = runs.iter().map(|run| u64::from(run.pages)).sum();
            Ok(Translated { listed, unmapped: 0 })
        })
    }

    fn publish(&mut self, publish: &Publish) -> Result<(), DeviceError> {
        self.with(|state| {
            if publish.generation != state.generation {
                return Err(stale());
            }
            state.by_process = std::mem::take(&mut state.adding);
            // Cached pages of files, by addresses that are gone by now.
            state.cached = state.by_process.remove(&(std::process::id() as i32)).unwrap_or_default();
            state.runs = state.by_process.values().flatten().copied().collect();
            state.publish = Some(*publish);
            Ok(())
        })
    }

    fn withdraw(&mut self) -> Result<(), DeviceError> {
        self.with(|state| {
            state.runs.clear();
            state.by_process.clear();
            state.publish = None;
            state.withdrawn += 1;
        });
        Ok(())
    }

    fn stats(&mut self) -> Result<Stats, DeviceError> {
        Ok(self.with(|state| Stats { generations: state.generation, ..Stats::default() }))
    }

    fn next_request(&mut self) -> Result<Option<Request>, DeviceError> {
        let mut byte = [0];
        // Empty is no error: the request is what counts.
        let _ = self.wake.recv(&mut byte);
        Ok(self.with(|state| state.requests.pop_front()))
    }
}
