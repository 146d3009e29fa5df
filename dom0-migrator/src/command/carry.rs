//! The carrier: between the two pipes that xl gives to its transport command, and the stream's connection.
//!
//! Bytes go from pipe to socket inside the kernel (`splice`); only headers are looked at, to count pages.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::follow::{Follower, Next};
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN};
use crate::handoff::{Event, Peer, Role};
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
    let (report, result) = carry(&socket);
    let _ = peer.tell(&Event::Carried(report));
    match result {
        Ok(()) => EXIT_MIGRATED,
        Err(error) => {
            tracing::error!(%error, "the connection to the target broke");
            EXIT_FAILED
        }
    }
}

fn carry(socket: &TcpStream) -> (CarriedReport, io::Result<()>) {
    let (input, output) = match take_pipes() {
        Ok(pipes) => pipes,
        Err(error) => return (CarriedReport::default(), Err(error)),
    };
    std::thread::scope(|scope| {
        let back = scope.spawn(move || backward(socket, &File::from(output)));
        let mut follower = Follower::default();
        let mut report = CarriedReport::default();
        let there = forward(&File::from(input), socket, &mut follower, &mut report.bytes_sent);
        // xl has closed its end, or the target has gone: the other direction ends when the target has heard of it.
        let _ = socket.shutdown(if there.is_ok() { Shutdown::Write } else { Shutdown::Both });
        let back = back.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
        report.pages = follower.pages();
        report.bytes_received = back.as_ref().copied().unwrap_or(0);
        (report, there.and(back.map(|_| ())))
    })
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

/// Passes everything from a socket to a pipe, each piece as it comes: xl waits for answers of a few bytes. (`io::copy` would
/// splice here, and the kernel's splice from a TCP socket returns only when the socket ends or has given all that was asked.)
fn backward(mut socket: &TcpStream, mut pipe: &File) -> io::Result<u64> {
    let mut buffer = vec![0; 64 * 1024];
    let mut passed = 0;
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return Ok(passed),
            Ok(length) => {
                pipe.write_all(buffer.get(..length).unwrap_or_default())?;
                passed += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Passes everything from a pipe to a socket, until the pipe's end; `sent` counts.
fn forward(pipe: &File, socket: &TcpStream, follower: &mut Follower, sent: &mut u64) -> io::Result<()> {
    loop {
        match follower.next() {
            Next::See(length) => {
                let mut bytes = vec![0; length];
                let length = read_up_to(pipe, &mut bytes)?;
                let seen = bytes.get(..length).unwrap_or_default();
                (&*socket).write_all(seen)?;
                *sent += length as u64;
                if length < bytes.len() {
                    return Ok(());
                }
                follower.seen(&bytes);
            }
            Next::Pass(length) => {
                if splice(pipe, socket, length, sent)? < length {
                    return Ok(());
                }
            }
            Next::PassAll => return splice(pipe, socket, u64::MAX, sent).map(|_| ()),
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

/// Moves up to `length` bytes from a pipe to a socket; less only at the pipe's end.
fn splice(pipe: &File, socket: &TcpStream, length: u64, sent: &mut u64) -> io::Result<u64> {
    let mut moved = 0;
    while moved < length {
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
            0 => break,
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
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_answer_arrives_while_the_connection_stays_open() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let (mut read_end, write_end) = io::pipe().unwrap();
        let back = std::thread::spawn(move || backward(&near, &File::from(OwnedFd::from(write_end))));
        for answer in [b"banner", b"ready!"] {
            far.write_all(answer).unwrap();
            let mut arrived = [0; 6];
            read_end.read_exact(&mut arrived).unwrap();
            assert_eq!(&arrived, answer);
        }
        drop(far);
        assert_eq!(back.join().unwrap().unwrap(), 12);
    }

    #[test]
    fn everything_arrives_in_order() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
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
        forward(&File::from(OwnedFd::from(read_end)), &near, &mut follower, &mut sent).unwrap();
        drop(near);
        writer.join().unwrap();
        assert!(reader.join().unwrap() == expected);
        assert_eq!(sent, expected.len() as u64);
        assert_eq!(follower.pages(), None);
    }
}
