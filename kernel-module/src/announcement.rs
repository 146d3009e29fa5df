//! How dom0 finds the lists: nodes in xenstore, and an event channel.

use enlightenment::{ABI_VERSION, Pfn, xenstore};

use crate::Shim;

/// What stands in xenstore about us, and the event channel.
///
/// A migrated domain has a new directory in the xenstore of another host, and none of its event channels came with it, while its
/// memory and so this value did. [`Self::is_ours`] tells: the directory does not say what we wrote. An event channel is
/// closed only while it is known to be ours, since after a migration its number may be someone else's.
#[derive(Debug)]
pub struct Announcement {
    port: Option<u32>,
    complete: bool,
}

impl Announcement {
    /// Nothing is announced.
    pub const fn new() -> Self {
        Self { port: None, complete: false }
    }

    /// Whether dom0 can find the lists.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether the nodes are those that [`Self::make`] wrote.
    pub fn is_ours<S: Shim>(&self, shim: &mut S, root: Pfn) -> bool {
        let Some(port) = self.port else { return false };
        read_number(shim, xenstore::ROOT_PFN) == Some(root.0)
            && read_number(shim, xenstore::EVENT_CHANNEL) == Some(u64::from(port))
    }

    /// Allocates an event channel and writes all nodes; the node of requests is made if there is none.
    pub fn make<S: Shim>(&mut self, shim: &mut S, root: Pfn, generation: u64) {
        self.port = shim.event_channel_allocate();
        let mut made = self.port.is_some();
        made &= write_number(shim, xenstore::ROOT_PFN, root.0);
        made &= write_number(shim, xenstore::EVENT_CHANNEL, u64::from(self.port.unwrap_or(0)));
        made &= write_number(shim, xenstore::GENERATION, generation);
        made &= write_pair(shim, xenstore::ANSWER, 0, generation);
        if shim.xenstore_read(xenstore::REQUEST, &mut []).is_none() {
            made &= shim.xenstore_write(xenstore::REQUEST, "");
        }
        // Last, since a reader that finds the version may rely on the others.
        made &= write_number(shim, xenstore::VERSION, u64::from(ABI_VERSION));
        if let Some(port) = self.port.take_if(|_| !made) {
            shim.event_channel_close(port);
        }
        self.complete = made;
    }

    /// Tells dom0 of a generation, and which request it answers (0 for none); whether the signal went out.
    pub fn tell<S: Shim>(&mut self, shim: &mut S, generation: u64, answers: u64) -> bool {
        let Some(port) = self.port.filter(|_| self.complete) else { return false };
        write_number(shim, xenstore::GENERATION, generation);
        if answers != 0 {
            write_pair(shim, xenstore::ANSWER, answers, generation);
        }
        shim.event_channel_signal(port)
    }

    /// Takes all back.
    pub fn unmake<S: Shim>(&mut self, shim: &mut S, root: Pfn) {
        let ours = self.is_ours(shim, root);
        shim.xenstore_remove();
        if let Some(port) = self.port.filter(|_| ours) {
            shim.event_channel_close(port);
        }
        *self = Self::new();
    }
}

impl Default for Announcement {
    fn default() -> Self {
        Self::new()
    }
}

fn read_number<S: Shim>(shim: &mut S, node: &str) -> Option<u64> {
    let mut value = [0; 20];
    let length = shim.xenstore_read(node, &mut value)?;
    xenstore::parse_number(value.get(..length)?)
}

fn write_number<S: Shim>(shim: &mut S, node: &str, number: u64) -> bool {
    let mut text = Text::new();
    text.push_number(number);
    shim.xenstore_write(node, text.as_str())
}

fn write_pair<S: Shim>(shim: &mut S, node: &str, first: u64, second: u64) -> bool {
    let mut text = Text::new();
    text.push_number(first);
    text.push(b' ');
    text.push_number(second);
    shim.xenstore_write(node, text.as_str())
}

/// Room for two numbers of 20 digits and a space. `core::fmt` would do, at ten times the size of object code.
struct Text {
    bytes: [u8; 41],
    length: usize,
}

impl Text {
    fn new() -> Self {
        Self { bytes: [0; 41], length: 0 }
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
            self.length += 1;
        }
    }

    fn push_number(&mut self, number: u64) {
        let mut power = 1_u64;
        while number / power >= 10 {
            power *= 10;
        }
        while power > 0 {
            self.push(b'0' + (number / power % 10) as u8);
            power /= 10;
        }
    }

    fn as_str(&self) -> &str {
        self.bytes.get(..self.length).and_then(|bytes| core::str::from_utf8(bytes).ok()).unwrap_or("")
    }
}
