//! A network between two hosts that a test can hold up and cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// What becomes of a connection whose first line has this word.
#[derive(Clone, Copy)]
pub enum Late {
    /// It is delivered so much later.
    By(&'static str, Duration),
    /// It ends once that line is delivered.
    Never(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    HeldUp,
    Cut,
}

struct Inside {
    state: Mutex<State>,
    changed: Condvar,
    connections: Mutex<Vec<TcpStream>>,
    late: Option<Late>,
}

/// The network: what connects here comes out at the target.
#[derive(Clone)]
pub struct Between {
    pub address: String,
    inside: Arc<Inside>,
}

impl Between {
    /// To a target.
    pub fn new(target: &str, late: Option<Late>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let inside = Arc::new(Inside {
            state: Mutex::new(State::Open),
            changed: Condvar::new(),
            connections: Mutex::default(),
            late,
        });
        let (target, shared) = (target.to_owned(), inside.clone());
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let (target, shared) = (target.clone(), shared.clone());
                thread::spawn(move || shared.connect(near, &target));
            }
        });
        Self { address, inside }
    }

    fn set(&self, to: State) {
        *self.inside.state.lock().unwrap() = to;
        self.inside.changed.notify_all();
    }

    /// Nothing passes until it goes on.
    pub fn hold_up(&self) {
        self.set(State::HeldUp);
    }

    /// All connections end, and new ones too.
    pub fn cut(&self) {
        self.set(State::Cut);
        for connection in self.inside.connections.lock().unwrap().drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// What was held up passes; new connections do.
    pub fn go_on(&self) {
        self.set(State::Open);
    }
}

impl Inside {
    fn connect(self: &Arc<Self>, near: TcpStream, target: &str) {
        if !self.passes() {
            return;
        }
        let Ok(far) = TcpStream::connect(target) else { return };
        for end in [&near, &far] {
            end.set_nodelay(true).unwrap();
            self.connections.lock().unwrap().push(end.try_clone().unwrap());
        }
        let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let shared = self.clone();
        thread::spawn(move || shared.carry(&back_from, &back_to, None));
        self.carry(&near, &far, self.late);
    }

    fn carry(&self, mut from: &TcpStream, mut to: &TcpStream, late: Option<Late>) {
        let mut bytes = vec![0; 64 << 10];
        let mut late = late;
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            let bytes = &bytes[..length];
            let has = |word| String::from_utf8_lossy(bytes).contains(word);
            let ends = match late.take() {
                Some(Late::By(word, time)) if has(word) => {
                    thread::sleep(time);
                    false
                }
                Some(Late::Never(word)) => has(word),
                _ => false,
            };
            if !self.passes() || to.write_all(bytes).is_err() {
                break;
            }
            if ends {
                let _ = from.shutdown(Shutdown::Both);
            }
        }
        if self.passes() {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    /// Waits as long as it is held up. False: it is cut.
    fn passes(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        while *state == State::HeldUp {
            state = self.changed.wait(state).unwrap();
        }
        *state == State::Open
    }
}
