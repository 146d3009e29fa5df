//! Between the stream's connection and `xl migrate-receive`: memory goes in, xl's words come out and are looked at, and GO is said
//! by the session alone.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{ChildStdin, ChildStdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::xl_words::{BANNER, GO, READY, Word, Words};
use crate::stream_head::StreamHead;

/// Bytes of one step into xl's pipe; the pipe is made to hold as many.
const STEP: usize = 256 * 1024;

/// What xl says, or that it says no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Whether the domain runs (0) or why not.
    Status(u8),
    /// Something that no xl says.
    Nonsense(String),
}

/// The way into xl.
#[derive(Clone, Debug)]
pub struct Inlet {
    pipe: Arc<Mutex<Option<File>>>,
    ready: Arc<AtomicBool>,
}

impl Inlet {
    /// Lets xl start the domain.
    ///
    /// # Errors
    /// When xl is gone.
    pub fn go(&self) -> io::Result<()> {
        match &mut *self.pipe.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(pipe) => pipe.write_all(GO),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Nothing more comes: an xl that waits for memory or for GO gives up.
    pub fn close(&self) {
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Begins to pass on, in two threads that end with xl. `configured` is given the domain's configuration before xl has it whole;
/// `complete` is called before xl's "ready" is passed on, and says whether it
/// may be; `said` hears the rest.
///
/// # Errors
/// When there is no thread to be had.
pub fn start(
    stream: &TcpStream,
    stdin: ChildStdin,
    stdout: ChildStdout,
    configured: impl FnOnce(&Value) + Send + 'static,
    complete: impl FnOnce() -> bool + Send + 'static,
    said: impl Fn(Said) + Send + 'static,
) -> io::Result<Inlet> {
    let pipe = File::from(OwnedFd::from(stdin));
    // A larger pipe means fewer turns between the two; where the system does not allow it, it works as well.
    let _ = nix::fcntl::fcntl(&pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(STEP.cast_signed() as i32));
    let own = pipe.try_clone()?;
    let inlet = Inlet { pipe: Arc::new(Mutex::new(Some(pipe))), ready: Arc::default() };
    let (into, outof) = (stream.try_clone()?, stream.try_clone()?);
    let gate = inlet.clone();
    std::thread::Builder::new()
        .name("stream in".into())
        .spawn(move || pass_in(into, own, &gate, configured))?;
    let ready = inlet.ready.clone();
    std::thread::Builder::new().name("stream out".into()).spawn(move || {
        let mut complete = Some(complete);
        let mut may_pass = || complete.take().is_none_or(|complete| complete());
        if let Err(problem) = pass_out(stdout, &outof, &ready, &mut may_pass, &said) {
            said(Said::Nonsense(problem));
        }
        let _ = outof.shutdown(Shutdown::Both);
    })?;
    Ok(inlet)
}

/// Passes memory on. Once xl was "ready" nothing is passed any more, whatever comes.
fn pass_in(mut stream: TcpStream, mut pipe: File, inlet: &Inlet, configured: impl FnOnce(&Value)) {
    let (mut head, mut configured) = (StreamHead::default(), Some(configured));
    let mut buffer = vec![0; STEP];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) if inlet.ready.load(Ordering::Acquire) => break,
            Ok(length) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                if let Some(configuration) = head.take(bytes)
                    && let Some(configured) = configured.take()
                {
                    configured(&configuration);
                }
                if pipe.write_all(bytes).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    drop(pipe);
    // A stream that ends too early ends xl; one that ends in time leaves the way open for GO.
    if !inlet.ready.load(Ordering::Acquire) {
        inlet.close();
    }
}

fn pass_out(
    mut stdout: impl Read,
    mut stream: &TcpStream,
    ready: &AtomicBool,
    may_pass: &mut dyn FnMut() -> bool,
    said: &impl Fn(Said),
) -> Result<(), String> {
    let mut words = Words::default();
    let mut buffer = [0; 4096];
    loop {
        let length = match stdout.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.to_string()),
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        for word in words.take(bytes).map_err(|error| error.to_string())? {
            // A source that is gone is not xl's affair here: what it says next still counts.
            let _ = match word {
                Word::Banner => stream.write_all(BANNER),
                Word::Ready => {
                    ready.store(true, Ordering::Release);
                    if may_pass() { stream.write_all(READY) } else { Ok(()) }
                }
                Word::Status(status) => {
                    said(Said::Status(status));
                    Ok(())
                }
                Word::GoBack => Ok(()),
            };
        }
    }
}
