//! The carrier: between the two pipes that xl gives to its transport command, and the stream's connection.
//!
//! Bytes go from pipe to socket inside the kernel (`splice`); only headers are looked at, to count pages. One message never
//! passes: GO, by which xl lets the target run the domain. What xl says after the target's "ready" is that; the carrier tells
//! the command and waits for what to answer xl ([`crate::handover`]).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::follow::{Follower, Next};
use super::xl_words::{BANNER, GO, READY, REPORT, Word, Words};
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN};
use crate::handoff::{Answer, Event, Peer, Role};
use crate::report::CarriedReport;

/// Most bytes of one step.
const STEP: usize = 1 << 20;

/// Carries until both directions have ended.
pub fn run() -> u8 {
    let peer = match Peer::from_environment() {
        Ok(Some(peer)) => peer,
        Ok(None) => {
            tracing::error!("carry is started by xl for `dom0-migrator migrate`, not by hand");
            return EXIT_NOT_BEGUN;
        }
        Err(error) => {
            tracing::error!(%error, "the carrier finds nobody to carry for");
            return EXIT_NOT_BEGUN;
        }
    };
    let socket = match peer.introduce(Role::Carrier, None) {
        Ok((_, Some(socket))) => TcpStream::from(socket),
        Ok((_, None)) | Err(_) => {
            tracing::error!("the carrier was given no connection");
            return EXIT_NOT_BEGUN;
        }
    };
    let permission = || peer.tell(&Event::Permission).map_or(Answer::Doubt, |()| peer.wait_for_answer());
    let (report, result) = carry(&socket, permission);
    let _ = peer.tell(&Event::Carried(report));
    match result {
        Ok(()) => EXIT_MIGRATED,
        Err(error) => {
            tracing::error!(%error, "the connection to the target broke");
            EXIT_FAILED
        }
    }
}

fn carry(socket: &TcpStream, permission: impl FnOnce() -> Answer) -> (CarriedReport, io::Result<()>) {
    let (input, output) = match take_pipes() {
        Ok(pipes) => pipes,
        Err(error) => return (CarriedReport::default(), Err(error)),
    };
    let ready = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let back = scope.spawn(|| backward(socket, File::from(output), &ready));
        let mut follower = Follower::default();
        let mut report = CarriedReport::default();
        let input = File::from(input);
        let there = forward(&input, socket, &mut follower, &mut report.bytes_sent, &ready)
            .and_then(|end| if end == End::Ready { said_go(&input) } else { Ok(false) });
        let answer = matches!(there, Ok(true)).then(permission);
        // xl has closed its end or said its last, or the target has gone: the other direction ends when the target has heard of it.
        // After "ready" nothing more is due from there.
        let over = there.is_err() || ready.load(Ordering::Acquire);
        let _ = socket.shutdown(if over { Shutdown::Both } else { Shutdown::Write });
        let back = back.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
        report.pages = follower.pages();
        report.bytes_received = back.as_ref().map_or(0, |(passed, _)| *passed);
        let answered = match (answer, &back) {
            (Some(answer), Ok((_, output))) => tell_xl(output, answer),
            _ => Ok(()),
        };
        (report, there.and(back.map(|_| ())).and(answered))
    })
}

/// Tells xl how it went, in the target's words.
fn tell_xl(mut output: &File, answer: Answer) -> io::Result<()> {
    match answer {
        Answer::Runs => output.write_all(&[REPORT, &[0]].concat()),
        Answer::Kept => output.write_all(&[REPORT, &[1], GO].concat()),
        // The pipe's end is what makes xl leave everything as it is.
        Answer::Doubt => Ok(()),
    }
}

/// Whether xl gives permission; not when it has ended.
fn said_go(pipe: &File) -> io::Result<bool> {
    let mut said = vec![0; GO.len()];
    let length = read_up_to(pipe, &mut said)?;
    match said.get(..length).unwrap_or_default() {
        [] => Ok(false),
        said if said == GO => Ok(true),
        said => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("xl said {:?} instead of giving permission", String::from_utf8_lossy(said)),
        )),
    }
}

/// Takes stdin and stdout over, and leaves /dev/null in their places: each pipe is then closed when its direction ends, which is
/// how xl learns of it.
fn take_pipes() -> io::Result<(OwnedFd, OwnedFd)> {
    let pipes = (io::stdin().as_fd().try_clone_to_owned()?, io::stdout().as_fd().try_clone_to_owned()?);
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&nothing)?;
    nix::unistd::dup2_stdout(&nothing)?;
    Ok(pipes)
}

/// Passes the target's banner and "ready" from a socket to a pipe, each as it comes; nothing else comes this way. Returns the
/// bytes, and the pipe, which would tell xl by its end that the target is gone.
fn backward(mut socket: &TcpStream, mut pipe: File, ready: &AtomicBool) -> io::Result<(u64, File)> {
    let mut buffer = vec![0; 4096];
    let mut words = Words::default();
    let mut passed = 0;
    let mut complete = false;
    loop {
        match socket.read(&mut buffer) {
            Ok(0) if complete => return Ok((passed, pipe)),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                for word in
                    words.take(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?
                {
                    match word {
                        Word::Banner => pipe.write_all(BANNER)?,
                        Word::Ready => {
                            // First: once xl has read it, what xl says is no memory any more.
                            ready.store(true, Ordering::Release);
                            complete = true;
                            pipe.write_all(READY)?;
                        }
                        Word::Status(_) | Word::GoBack => {
                            return Err(io::Error::new(
                                io::ErrorKind::InvalidData,
                                "the target reports on the stream, which it does elsewhere",
                            ));
                        }
                    }
                }
                passed += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Why there is nothing more to pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The pipe has ended.
    Pipe,
    /// The target has all, and xl says something: permission.
    Ready,
}

/// Waits until xl says something. What it says once the target was "ready" is for us: all memory has come then, so there is
/// nothing else of it in the pipe.
fn is_memory(pipe: &File, ready: &AtomicBool) -> io::Result<bool> {
    let mut waiting = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) => return Ok(!ready.load(Ordering::Acquire)),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Passes everything from a pipe to a socket, until the pipe's end or xl's permission; `sent` counts.
fn forward(
    pipe: &File,
    socket: &TcpStream,
    follower: &mut Follower,
    sent: &mut u64,
    ready: &AtomicBool,
) -> io::Result<End> {
    loop {
        if !is_memory(pipe, ready)? {
            return Ok(End::Ready);
        }
        match follower.what_next() {
            Next::See(length) => {
                let mut bytes = vec![0; length];
                let length = read_up_to(pipe, &mut bytes)?;
                let seen = bytes.get(..length).unwrap_or_default();
                (&*socket).write_all(seen)?;
                *sent += length as u64;
                if length < bytes.len() {
                    return Ok(End::Pipe);
                }
                follower.seen(&bytes);
            }
            Next::Pass(length) => {
                if let Some(end) = splice(pipe, socket, length, sent, ready)? {
                    return Ok(end);
                }
            }
            Next::PassAll => {
                return splice(pipe, socket, u64::MAX, sent, ready).map(|end| end.unwrap_or(End::Pipe));
            }
        }
    }
}

/// Reads until the buffer is full or the pipe ends.
fn read_up_to(mut pipe: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match pipe.read(rest) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Moves `length` bytes from a pipe to a socket; why it ended when it was less.
fn splice(
    pipe: &File,
    socket: &TcpStream,
    length: u64,
    sent: &mut u64,
    ready: &AtomicBool,
) -> io::Result<Option<End>> {
    let mut moved = 0;
    while moved < length {
        if !is_memory(pipe, ready)? {
            return Ok(Some(End::Ready));
        }
        let step = usize::try_from(length - moved).unwrap_or(STEP).min(STEP);
        // SAFETY: both descriptors are open; no memory of ours is touched.
        let done = unsafe {
            libc::splice(
                pipe.as_raw_fd(),
                std::ptr::null_mut(),
                socket.as_raw_fd(),
                std::ptr::null_mut(),
                step,
                libc::SPLICE_F_MOVE,
            )
        };
        match done {
            0 => return Ok(Some(End::Pipe)),
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            bytes => {
                moved += bytes as u64;
                *sent += bytes as u64;
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn words_arrive_while_the_connection_stays_open() {
        let (near, mut far) = connected();
        let (mut read_end, write_end) = io::pipe().unwrap();
        let ready = std::sync::Arc::new(AtomicBool::new(false));
        let flag = ready.clone();
        let back = std::thread::spawn(move || backward(&near, File::from(OwnedFd::from(write_end)), &flag));
        for word in [BANNER, READY] {
            assert!(!ready.load(Ordering::Acquire));
            far.write_all(word).unwrap();
            let mut arrived = vec![0; word.len()];
            read_end.read_exact(&mut arrived).unwrap();
            assert_eq!(arrived, word);
        }
        assert!(ready.load(Ordering::Acquire));
        drop(far);
        assert_eq!(back.join().unwrap().unwrap().0, (BANNER.len() + READY.len()) as u64);
    }

    #[test]
    fn permission_never_reaches_the_wire() {
        let (near, mut far) = connected();
        let (read_end, mut write_end) = io::pipe().unwrap();
        let pipe = File::from(OwnedFd::from(read_end));
        let ready = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let carried = scope.spawn(|| {
                let end = forward(&pipe, &near, &mut Follower::default(), &mut 0, &ready).unwrap();
                (end, said_go(&pipe).unwrap())
            });
            write_end.write_all(&[7; 3000]).unwrap();
            far.read_exact(&mut [0; 3000]).unwrap();
            ready.store(true, Ordering::Release);
            write_end.write_all(GO).unwrap();
            assert_eq!(carried.join().unwrap(), (End::Ready, true));
        });
        drop(near);
        assert_eq!(far.read(&mut [0; 10]).unwrap(), 0);
    }

    #[test]
    fn everything_arrives_in_order() {
        let (near, mut far) = connected();
        let (read_end, write_end) = io::pipe().unwrap();
        // Of xl's form as far as the configuration, then something else: a part is looked at, the rest is spliced.
        let mut bytes = b"Xen saved domain, xl format\n \0 \r".to_vec();
        bytes.extend([0; 12]);
        bytes.extend(5_u32.to_le_bytes());
        bytes.extend((0..3_000_000_u32).map(|i| (i / 7) as u8));
        let expected = bytes.clone();
        let writer = std::thread::spawn(move || (&write_end).write_all(&bytes).unwrap());
        let reader = std::thread::spawn(move || {
            let mut arrived = Vec::new();
            far.read_to_end(&mut arrived).unwrap();
            arrived
        });
        let (mut follower, mut sent) = (Follower::default(), 0);
        forward(
            &File::from(OwnedFd::from(read_end)),
            &near,
            &mut follower,
            &mut sent,
            &AtomicBool::new(false),
        )
        .unwrap();
        drop(near);
        writer.join().unwrap();
        assert!(reader.join().unwrap() == expected);
        assert_eq!(sent, expected.len() as u64);
        assert_eq!(follower.pages(), None);
    }
}
