//! Asking the guest to publish its lists, by way of xenstore ([`enlightenment::xenstore`]).

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use enlightenment::xenstore::{
    ANSWER, DIRECTORY, EVENT_CHANNEL, REQUEST, ROOT_PFN, RequestKind, VERSION, parse_answer, parse_number,
    parse_request,
};
use enlightenment::{ABI_VERSION, Pfn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::event_channel::EventChannel;
use crate::xen::DomainId;
use crate::xenstore::{Store, StoreError, Xenstore};

/// How long to sleep at most between two looks at xenstore, whatever wakes or does not.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Why the guest's lists cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// xenstore failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The guest has no module that publishes lists.
    #[error(
        "domain {0} publishes no lists (no {DIRECTORY}/{VERSION} in xenstore): no module is loaded in it"
    )]
    NoModule(DomainId),
    /// The module is of another version.
    #[error("domain {domain} publishes lists of version {found:?}, this program reads {ABI_VERSION}")]
    Version {
        /// The domain.
        domain: DomainId,
        /// What it says.
        found: String,
    },
    /// The guest did not answer in time.
    #[error("domain {domain} did not answer request {sequence} within {} s: no probe runs in it, or it is busy", .patience.as_secs())]
    NoAnswer {
        /// The domain.
        domain: DomainId,
        /// The request.
        sequence: u64,
        /// How long was waited.
        patience: Duration,
    },
    /// The guest answered that there are none.
    #[error("domain {0} answered that it has no lists")]
    Nothing(DomainId),
    /// The node that says where the lists are is missing or no number.
    #[error("domain {0} does not say where its lists are (no {DIRECTORY}/{ROOT_PFN} in xenstore)")]
    NoRoot(DomainId),
}

/// What the guest answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its root page.
    pub root: Pfn,
    /// The generation that it published.
    pub generation: u64,
}

/// Writes requests to one domain and reads its answers.
#[derive(Debug)]
pub struct Requester<S> {
    store: S,
    domain: DomainId,
    channel: Option<EventChannel>,
}

impl<S: Store> Requester<S> {
    /// A requester for a domain.
    pub fn new(store: S, domain: DomainId) -> Self {
        Self { store, domain, channel: None }
    }

    /// The store that it uses.
    pub fn store(&mut self) -> &mut S {
        &mut self.store
    }

    fn node(&self, name: &str) -> String {
        format!("/local/domain/{}/{DIRECTORY}/{name}", self.domain)
    }

    /// Whether the guest has a module of our version.
    fn check(&mut self) -> Result<(), RequestError> {
        let version = self.store.read(&self.node(VERSION))?.ok_or(RequestError::NoModule(self.domain))?;
        if parse_number(&version) != Some(u64::from(ABI_VERSION)) {
            let found = String::from_utf8_lossy(&version).chars().take(40).collect();
            return Err(RequestError::Version { domain: self.domain, found });
        }
        Ok(())
    }

    /// Writes a request under the number that follows the last one's.
    ///
    /// # Errors
    /// [`RequestError::Store`].
    pub fn tell(&mut self, kind: RequestKind) -> Result<u64, RequestError> {
        let node = self.node(REQUEST);
        let last =
            self.store.read(&node)?.and_then(|value| parse_request(&value)).map_or(0, |(last, _)| last);
        let sequence = last.wrapping_add(1).max(1);
        self.store.write(&node, format!("{sequence} {}", kind.word()).as_bytes())?;
        Ok(sequence)
    }

    fn answered(&mut self, sequence: u64) -> Result<Option<u64>, RequestError> {
        let answer = self.store.read(&self.node(ANSWER))?.and_then(|value| parse_answer(&value));
        Ok(answer.filter(|(answered, _)| *answered == sequence).map(|(_, generation)| generation))
    }

    /// Asks for lists, and does not wait for the answer: the request's number, by which [`snapshot`](Requester::snapshot) knows it.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn request(&mut self) -> Result<u64, RequestError> {
        self.check()?;
        self.tell(RequestKind::Snapshot)
    }

    /// Whether this is the last request, and one for lists.
    fn is_asked(&mut self, sequence: u64) -> Result<bool, RequestError> {
        let last = self.store.read(&self.node(REQUEST))?.and_then(|value| parse_request(&value));
        Ok(last == Some((sequence, RequestKind::Snapshot)))
    }

    /// Asks for lists, unless that was done already, and waits for the answer; `wait` sleeps until something may have changed.
    fn ask(
        &mut self,
        asked: Option<u64>,
        patience: Duration,
        mut wait: impl FnMut(&mut Self, Duration),
    ) -> Result<Asked, RequestError> {
        self.check()?;
        let sequence = match asked {
            Some(sequence) if self.is_asked(sequence)? => sequence,
            _ => self.tell(RequestKind::Snapshot)?,
        };
        let deadline = Instant::now() + patience;
        let generation = loop {
            if let Some(generation) = self.answered(sequence)? {
                break generation;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RequestError::NoAnswer { domain: self.domain, sequence, patience });
            }
            wait(self, left.min(LOOK_EVERY));
        };
        if generation == 0 {
            return Err(RequestError::Nothing(self.domain));
        }
        let root = self.store.read(&self.node(ROOT_PFN))?.and_then(|value| parse_number(&value));
        Ok(Asked { root: root.map(Pfn).ok_or(RequestError::NoRoot(self.domain))?, generation })
    }
}

impl Requester<Xenstore> {
    /// Asks the guest to publish its lists as they are now, and waits for the answer. With the number of a [`request`](Self::request)
    /// that was made already, its answer is waited for, as long as nobody has asked for anything else since.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn snapshot(&mut self, asked: Option<u64>, patience: Duration) -> Result<Asked, RequestError> {
        self.store.watch(&self.node(ANSWER))?;
        let port = self.store.read(&self.node(EVENT_CHANNEL))?.and_then(|value| parse_number(&value));
        self.channel = port.and_then(|port| u32::try_from(port).ok()).and_then(|port| {
            EventChannel::bind(self.domain, port)
                .inspect_err(|error| tracing::debug!(%error, port, "no event channel, xenstore will do"))
                .ok()
        });
        let answer = self.ask(asked, patience, Self::wait);
        self.channel = None;
        answer
    }

    fn wait(&mut self, at_most: Duration) {
        if self.store.watch_pending() {
            let _ = self.store.take_watch_event();
            return;
        }
        let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
        let (store_ready, channel_ready) = {
            let mut waiting = vec![PollFd::new(self.store.as_fd(), PollFlags::POLLIN)];
            waiting.extend(self.channel.as_ref().map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)));
            if poll(&mut waiting, timeout).is_err() {
                return;
            }
            let ready = |at: usize| waiting.get(at).and_then(PollFd::any).unwrap_or(false);
            (ready(0), ready(1))
        };
        if store_ready && self.store.take_watch_event().is_err() {
            // The next look at xenstore tells the error.
            std::thread::sleep(Duration::from_millis(10));
        }
        if channel_ready && self.channel.as_mut().is_some_and(|channel| channel.take().is_err()) {
            self.channel = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A xenstore of which the guest's side answers when the requester waits.
    #[derive(Default)]
    struct Fake {
        nodes: BTreeMap<String, Vec<u8>>,
    }

    impl Store for Fake {
        fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
            Ok(self.nodes.get(path).cloned())
        }
        fn directory(&mut self, _: &str) -> Result<Vec<String>, StoreError> {
            Ok(Vec::new())
        }
        fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
            self.nodes.insert(path.to_owned(), value.to_owned());
            Ok(())
        }
    }

    const BASE: &str = "/local/domain/3/data/poolskip";

    fn requester(nodes: &[(&str, &str)]) -> Requester<Fake> {
        let nodes = nodes
            .iter()
            .map(|(name, value)| (format!("{BASE}/{name}"), value.as_bytes().to_owned()))
            .collect();
        Requester::new(Fake { nodes }, DomainId(3))
    }

    fn answer_with(text: &'static str) -> impl FnMut(&mut Requester<Fake>, Duration) {
        move |requester, _| {
            requester.store.nodes.insert(format!("{BASE}/answer"), text.as_bytes().to_owned());
        }
    }

    #[test]
    fn an_answer_to_this_request_is_taken() {
        let mut requester =
            requester(&[("version", "1"), ("root-pfn", "77"), ("request", "6 ended"), ("answer", "6 2")]);
        let asked = requester.ask(None, Duration::from_secs(1), answer_with("7 3")).unwrap();
        assert_eq!(asked, Asked { root: Pfn(77), generation: 3 });
        assert_eq!(requester.store.nodes[&format!("{BASE}/request")], b"7 snapshot");
        assert_eq!(requester.tell(RequestKind::Begun).unwrap(), 8);
        assert_eq!(requester.store.nodes[&format!("{BASE}/request")], b"8 begun");
    }

    #[test]
    fn what_was_asked_before_is_not_asked_again_unless_somebody_asked_otherwise() {
        let nodes = [("version", "1"), ("root-pfn", "77"), ("request", "6 ended")];
        let mut requester = requester(&nodes);
        let asked = requester.request().unwrap();
        assert_eq!((asked, &*requester.store.nodes[&format!("{BASE}/request")]), (7, &b"7 snapshot"[..]));
        requester.store.nodes.insert(format!("{BASE}/answer"), b"7 3".to_vec());
        let answer = requester.ask(Some(asked), Duration::ZERO, answer_with("")).unwrap();
        assert_eq!(answer, Asked { root: Pfn(77), generation: 3 });
        assert_eq!(requester.store.nodes[&format!("{BASE}/request")], b"7 snapshot");
        requester.tell(RequestKind::Ended).unwrap();
        let answer = requester.ask(Some(asked), Duration::from_secs(1), answer_with("9 4")).unwrap();
        assert_eq!(answer, Asked { root: Pfn(77), generation: 4 });
        assert_eq!(requester.store.nodes[&format!("{BASE}/request")], b"9 snapshot");
    }

    #[test]
    fn an_old_answer_is_not() {
        let mut requester = requester(&[("version", "1"), ("root-pfn", "77"), ("answer", "6 2")]);
        let error = requester.ask(None, Duration::ZERO, answer_with("6 2")).unwrap_err();
        assert!(matches!(error, RequestError::NoAnswer { sequence: 1, .. }), "{error}");
    }

    #[test]
    fn what_a_guest_may_say_wrongly_is_refused() {
        let ask = |nodes: &[(&str, &str)]| {
            requester(nodes).ask(None, Duration::from_millis(1), answer_with("1 4")).unwrap_err()
        };
        assert!(matches!(ask(&[]), RequestError::NoModule(DomainId(3))));
        assert!(matches!(ask(&[("version", "2")]), RequestError::Version { .. }));
        assert!(matches!(ask(&[("version", "1"), ("root-pfn", "-1")]), RequestError::NoRoot(_)));
        let mut none = requester(&[("version", "1"), ("root-pfn", "1")]);
        assert!(matches!(
            none.ask(None, Duration::from_secs(1), answer_with("1 0")),
            Err(RequestError::Nothing(_))
        ));
    }
}
