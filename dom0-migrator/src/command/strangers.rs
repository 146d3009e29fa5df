//! Connections that have not said yet who they are: so many at once, and the oldest goes for a new one. Whoever connects and says nothing
//! so holds a place only as long as nobody else wants it.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Strangers at once. A peer with a certificate is one for some milliseconds.
pub const STRANGERS_MAX: usize = 64;

/// All strangers.
#[derive(Debug, Default)]
pub struct Strangers(Mutex<Inside>);

#[derive(Debug, Default)]
struct Inside {
    next: u64,
    /// By number, so the oldest first.
    open: BTreeMap<u64, TcpStream>,
}

/// One of them; it is none any more when this is dropped.
#[derive(Debug)]
pub struct Stranger {
    number: u64,
    all: Arc<Strangers>,
}

impl Strangers {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one in; true with it when another had to go, whose connection is closed.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn admit(self: &Arc<Self>, connection: &TcpStream) -> io::Result<(Stranger, bool)> {
        let connection = connection.try_clone()?;
        let mut inside = self.lock();
        let number = inside.next;
        inside.next += 1;
        inside.open.insert(number, connection);
        let oldest = if inside.open.len() > STRANGERS_MAX { inside.open.pop_first() } else { None };
        if let Some((_, oldest)) = &oldest {
            // Whoever reads from it is told that it has ended.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        Ok((Stranger { number, all: self.clone() }, oldest.is_some()))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.all.lock().open.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    #[test]
    fn the_oldest_stranger_goes_for_a_new_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let all = Arc::new(Strangers::default());
        let mut inside = Vec::new();
        let connect = || {
            let near = TcpStream::connect(address).unwrap();
            let (far, _) = listener.accept().unwrap();
            let (stranger, one_went) = all.admit(&far).unwrap();
            (near, stranger, one_went, far)
        };
        for _ in 0..STRANGERS_MAX {
            inside.push(connect());
        }
        assert!(inside.iter().all(|(_, _, one_went, _)| !one_went));
        // The second says who it is in the meantime, and makes room for one.
        let (mut second, said, _, _far) = inside.remove(1);
        drop(said);
        let one_more: Vec<_> = (0..2).map(|_| connect()).collect();
        assert_eq!((one_more[0].2, one_more[1].2), (false, true));
        assert_eq!(inside[0].0.read(&mut [0]).unwrap(), 0, "it was not closed");
        for open in [&mut second, &mut inside[1].0] {
            open.set_nonblocking(true).unwrap();
            assert_eq!(open.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }
}
