//! The way to libxl and back: messages on stdout, replies on stdin.

use std::io::{Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::message::Message;
use crate::xen::logger::{Level, Sink};

/// Name under which our own lines appear in xl's log.
const CONTEXT: &str = "poolskip";

/// libxl is gone, or does not keep to the protocol.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The message could not be written.
    #[error("libxl cannot be told of {what}: {source}")]
    Write {
        /// The message's kind.
        what: &'static str,
        /// The error.
        source: std::io::Error,
    },
    /// No reply came.
    #[error("libxl did not reply to {what}: {source}")]
    Reply {
        /// The message's kind.
        what: &'static str,
        /// The error.
        source: std::io::Error,
    },
}

/// The channel. A message is written whole while its lock is held, so messages of several threads do not mix; waiting for a
/// reply holds only the other lock, so that log lines pass while libxl suspends the domain.
pub struct Channel {
    out: Mutex<Box<dyn Write + Send>>,
    replies: Mutex<Box<dyn Read + Send>>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Channel")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// A channel over a pair of streams.
    pub fn new(replies: impl Read + Send + 'static, out: impl Write + Send + 'static) -> Self {
        Self { out: Mutex::new(Box::new(out)), replies: Mutex::new(Box::new(replies)) }
    }

    /// Sends a message that has no reply.
    ///
    /// # Errors
    /// [`ChannelError::Write`] when libxl is gone.
    pub fn tell(&self, what: &'static str, message: &Message<'_>) -> Result<(), ChannelError> {
        debug_assert!(!message.has_reply());
        self.write(what, message)
    }

    /// Sends a message and waits for its reply.
    ///
    /// # Errors
    /// [`ChannelError`] when libxl is gone.
    pub fn ask(&self, what: &'static str, message: &Message<'_>) -> Result<i32, ChannelError> {
        debug_assert!(message.has_reply());
        // Taken first and kept, so that the replies of two askers cannot be swapped.
        let mut replies = lock(&self.replies);
        self.write(what, message)?;
        let mut reply = [0; 4];
        replies.read_exact(&mut reply).map_err(|source| ChannelError::Reply { what, source })?;
        Ok(i32::from_ne_bytes(reply))
    }

    /// Sends a line of log; nothing can be done when libxl is gone, so nothing is.
    pub fn log(&self, level: Level, text: &str) {
        let message = Message::Log { level, errno: -1, context: CONTEXT, text };
        let _ = self.write("a log line", &message);
    }

    fn write(&self, what: &'static str, message: &Message<'_>) -> Result<(), ChannelError> {
        let bytes = message.encode();
        let mut out = lock(&self.out);
        out.write_all(&bytes)
            .and_then(|()| out.flush())
            .map_err(|source| ChannelError::Write { what, source })
    }
}

impl Sink for Channel {
    fn message(&self, level: Level, errno: i32, context: &str, text: &str) {
        let _ = self.write("a log line", &Message::Log { level, errno, context, text });
    }

    fn progress(&self, context: &str, doing: &str, done: u64, total: u64) {
        let _ = self.write("progress", &Message::Progress { context, doing, done, total });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    #[test]
    fn a_reply_belongs_to_its_question_while_logs_pass() {
        let (ours, mut libxl) = UnixStream::pair().unwrap();
        let channel = Arc::new(Channel::new(ours.try_clone().unwrap(), ours));
        let asker = std::thread::spawn({
            let channel = channel.clone();
            move || channel.ask("suspend", &Message::Suspend).unwrap()
        });
        let mut suspend = [0; 4];
        libxl.read_exact(&mut suspend).unwrap();
        assert_eq!(suspend, [2, 0, 3, 0]);
        // libxl has not replied yet, and a log line must get through all the same.
        channel.log(Level::INFO, "x");
        let mut length = [0; 2];
        libxl.read_exact(&mut length).unwrap();
        let mut body = vec![0; usize::from(u16::from_ne_bytes(length))];
        libxl.read_exact(&mut body).unwrap();
        assert_eq!(&body[..2], 1_u16.to_ne_bytes());
        libxl.write_all(&1_i32.to_ne_bytes()).unwrap();
        assert_eq!(asker.join().unwrap(), 1);
    }

    #[test]
    fn a_dead_libxl_is_an_error() {
        let (ours, libxl) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours.try_clone().unwrap(), ours);
        drop(libxl);
        assert!(channel.ask("suspend", &Message::Suspend).is_err());
    }
}
