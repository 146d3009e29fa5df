//! A transport for `xl migrate` that compresses with zstd: the baseline "stock with zstd on the pipe". No part of Poolskip.
//!
//! ```text
//! zstd-pipe send HOST:PORT [--json FILE]       standard input and output to the other side
//! zstd-pipe receive HOST:PORT COMMAND ARG...   accepts one connection, runs the command on it; its exit code
//! ```
//!
//! Both directions are compressed, and what is read is sent at once: the two `xl` talk to each other before and after the memory.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write, stdin, stdout};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use serde::Serialize;

/// zstd's fastest ordinary level: the emulated processor must not become what is measured.
const LEVEL: i32 = 1;

/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;

/// zstd between two ends of `xl migrate`.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Side,
}

#[derive(Subcommand)]
enum Side {
    /// Connects, and carries standard input and output.
    Send {
        /// HOST:PORT of the other side.
        to: String,
        /// Where the numbers of bytes go in the end.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Waits for one connection, and runs a command on it.
    Receive {
        /// HOST:PORT to listen on.
        on: String,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

/// Bytes of both directions.
#[derive(Debug, Default, Serialize)]
struct Carried {
    /// Before compression, to the other side.
    plain_sent: u64,
    /// After it: what went over the network.
    wire_sent: u64,
    /// What came from the network.
    wire_received: u64,
    /// After decompression.
    plain_received: u64,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Side::Send { to, json } => {
            let stream = TcpStream::connect(&to).with_context(|| format!("cannot connect to {to}"))?;
            let carried = carry(&stream, stdin().lock(), stdout())?;
            if let Some(path) = json {
                let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
                serde_json::to_writer(file, &carried)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Side::Receive { on, command } => receive(&on, &command),
    }
}

fn receive(on: &str, command: &[OsString]) -> Result<ExitCode> {
    let listener = TcpListener::bind(on).with_context(|| format!("cannot listen on {on}"))?;
    eprintln!("ready on {}", listener.local_addr()?);
    let (stream, _) = listener.accept()?;
    let (program, arguments) = command.split_first().context("no command is given")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let (input, output) = child.stdin.take().zip(child.stdout.take()).context("the command has no pipes")?;
    carry(&stream, output, input)?;
    let status = child.wait()?;
    // A command that a signal ended has no code.
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// Carries until `from` has ended and the other side has closed.
fn carry(stream: &TcpStream, from: impl Read, to: impl Write + Send + 'static) -> Result<Carried> {
    stream.set_nodelay(true)?;
    let back = stream.try_clone()?;
    let receiving = thread::spawn(move || decompress(back, to));
    let sent = compress(from, stream);
    stream.shutdown(Shutdown::Write)?;
    let (plain_sent, wire_sent) = sent?;
    let (wire_received, plain_received) =
        receiving.join().map_err(|_| anyhow!("the thread that decompresses panicked"))??;
    Ok(Carried { plain_sent, wire_sent, wire_received, plain_received })
}

fn compress(mut from: impl Read, to: impl Write) -> Result<(u64, u64)> {
    let mut encoder = zstd::Encoder::new(Counting { inner: to, bytes: 0 }, LEVEL)?;
    let (mut chunk, mut plain) = (vec![0; CHUNK], 0);
    loop {
        let length = from.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        plain += length as u64;
        encoder.write_all(&chunk[..length])?;
        // A reader that gave less than it was asked for has no more for now: the other side may be waiting for this.
        if length < CHUNK {
            encoder.flush()?;
        }
    }
    Ok((plain, encoder.finish()?.bytes))
}

/// Decompresses until the other side has closed; the bytes read and written.
fn decompress(from: impl Read, mut to: impl Write) -> Result<(u64, u64)> {
    let mut decoder = zstd::Decoder::new(Counting { inner: from, bytes: 0 })?;
    let (mut chunk, mut plain) = (vec![0; CHUNK], 0);
    loop {
        let length = decoder.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        plain += length as u64;
        to.write_all(&chunk[..length])?;
        to.flush()?;
    }
    Ok((decoder.finish().into_inner().bytes, plain))
}

/// Counts what passes.
struct Counting<T> {
    inner: T,
    bytes: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let length = self.inner.read(into)?;
        self.bytes += length as u64;
        Ok(length)
    }
}
