//! Opens that have no answer yet: those that wait for a thread, those that one is looking up, and those that
//! are tried again later. Each has a deadline; an open that hangs in a store is refused without the thread that
//! hangs, and that thread finds its open gone when it comes back.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slab::Slab;

use super::fds::Charge;
use crate::front::OpenRequest;
use crate::key::Key;

/// Opens without an answer at a time. Beyond it nothing is read from the kernel.
pub(super) const OPENS_MAX: usize = 1024;
/// Threads that look blobs up at a time: as many may hang in a dead store before healthy ones have to wait.
pub const OPENERS_MAX: usize = 64;
/// Pause before a lookup that failed for a passing reason is tried again; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Pause after a thread could not be started.
const SPAWN_PAUSE: Duration = Duration::from_millis(500);
/// How long a thread without work stays.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// An open without an answer.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) open: OpenRequest,
    pub(super) charge: Charge,
    /// When it is refused if it still has no answer.
    deadline: Instant,
    pause: Duration,
}

/// What [`Opens::watch`] found.
#[derive(Debug, Default)]
pub(super) struct News {
    /// They have had their time.
    pub(super) overdue: Vec<Pending>,
    /// So many threads more are needed.
    pub(super) threads: usize,
    /// The engine takes nothing new; this is what no thread had begun.
    pub(super) ended: bool,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Opens {
    state: Mutex<State>,
    /// Something was queued.
    work: Condvar,
    /// Something concerns who watches.
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How long after it came an open is refused, if it has no answer then.
    timeout: Duration,
    queued: VecDeque<Pending>,
    later: Vec<(Instant, Pending)>,
    /// What a thread is looking up; `None`: it took too long and was refused.
    running: Slab<Option<Pending>>,
    /// Threads, also those that are about to start.
    threads: usize,
    /// Of them, those that have taken an open and are not ready for another one.
    busy: usize,
    no_threads_before: Option<Instant>,
    ended: bool,
}

impl State {
    fn len(&self) -> usize {
        self.queued.len() + self.later.len() + self.running.iter().filter(|(_, open)| open.is_some()).count()
    }

    /// Takes every open that has had its time, wherever it is.
    fn take_overdue(&mut self, now: Instant) -> Vec<Pending> {
        let is_overdue = |pending: &Pending| pending.deadline <= now;
        let mut overdue: Vec<_> = self.running.iter_mut().filter_map(|(_, open)| open.take_if(|open| is_overdue(open))).collect();
        let (late, queued) = std::mem::take(&mut self.queued).into_iter().partition::<VecDeque<_>, _>(is_overdue);
        overdue.extend(late);
        self.queued = queued;
        overdue.extend(self.later.extract_if(.., |(_, open)| is_overdue(open)).map(|(_, open)| open));
        overdue
    }

    /// Queues what is to be tried again by now.
    fn queue_due(&mut self, now: Instant) {
        let due = self.later.extract_if(.., |&mut (at, _)| at <= now).map(|(_, open)| open);
        self.queued.extend(due);
    }

    /// When something is to be done next if nothing happens until then.
    fn next_event(&self, now: Instant) -> Option<Instant> {
        let running = self.running.iter().filter_map(|(_, open)| open.as_ref());
        let deadlines = self.queued.iter().chain(running).map(|open| open.deadline);
        let spawn = self.no_threads_before.filter(|at| now < *at && !self.queued.is_empty());
        deadlines.chain(self.later.iter().map(|(at, open)| open.deadline.min(*at))).chain(spawn).min()
    }

    /// Threads that wait for work, or will when they have started.
    const fn idle(&self) -> usize {
        self.threads - self.busy
    }

    /// Threads that are missing so that everything queued is looked up at once.
    fn missing_threads(&self, now: Instant) -> usize {
        if self.no_threads_before.is_some_and(|at| now < at) {
            return 0;
        }
        self.queued.len().saturating_sub(self.idle()).min(OPENERS_MAX.saturating_sub(self.threads))
    }
}

impl Opens {
    /// Nothing yet. An open is refused `timeout` after it came, if it has no answer then.
    pub(super) fn new(timeout: Duration) -> Self {
        Self { state: Mutex::new(State { timeout, ..State::default() }), work: Condvar::new(), news: Condvar::new() }
    }

    /// Opens that come from now on are refused after another time.
    pub(super) fn set_timeout(&self, timeout: Duration) {
        self.lock().timeout = timeout;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an open, or gives it back if there are too many, or if the engine ends.
    pub(super) fn push(&self, open: OpenRequest, charge: Charge) -> Result<(), (OpenRequest, Charge)> {
        let mut state = self.lock();
        if state.ended || state.len() >= OPENS_MAX {
            return Err((open, charge));
        }
        let deadline = Instant::now() + state.timeout;
        state.queued.push_back(Pending { open, charge, deadline, pause: PAUSE_MIN });
        self.work.notify_one();
        // Its deadline is to be watched, and perhaps there is no thread for it.
        self.news.notify_one();
        Ok(())
    }

    /// The next open to look up, for a thread that does that: its place and its key. When all is done about it, the thread
    /// is [`Opens::ready`] again. `None`: it is not needed any more.
    pub(super) fn take(&self) -> Option<(usize, Key)> {
        let state = self.lock();
        let wait = |state: &mut State| state.queued.is_empty() && !state.ended;
        let (mut state, _) = self.work.wait_timeout_while(state, IDLE_MAX, wait).unwrap_or_else(PoisonError::into_inner);
        let Some(pending) = state.queued.pop_front() else {
            state.threads -= 1;
            return None;
        };
        state.busy += 1;
        let key = pending.open.key.clone();
        Some((state.running.insert(Some(pending)), key))
    }

    /// A thread has done all about the open that it took.
    pub(super) fn ready(&self) {
        self.lock().busy -= 1;
    }

    /// The lookup of the open at `place` came to an end. `None`: it was refused meanwhile.
    pub(super) fn give_back(&self, place: usize) -> Option<Pending> {
        self.lock().running.try_remove(place).flatten()
    }

    /// Tries an open again after a pause. Gives it back if its time or the engine ends before that.
    pub(super) fn again(&self, mut pending: Pending) -> Option<Pending> {
        let mut state = self.lock();
        let at = Instant::now() + pending.pause;
        if state.ended || at >= pending.deadline {
            return Some(pending);
        }
        pending.pause = (pending.pause * 2).min(PAUSE_MAX);
        state.later.push((at, pending));
        self.news.notify_one();
        None
    }

    /// A thread that was wanted could not be started: nobody tries it again for a while.
    pub(super) fn not_started(&self) {
        let mut state = self.lock();
        state.threads -= 1;
        state.no_threads_before = Some(Instant::now() + SPAWN_PAUSE);
    }

    /// Waits until something has to be done about an open: for the one thread that watches.
    pub(super) fn watch(&self) -> News {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            state.queue_due(now);
            let overdue = if state.ended { drain(&mut state) } else { state.take_overdue(now) };
            let threads = if state.ended { 0 } else { state.missing_threads(now) };
            if state.ended || !overdue.is_empty() || threads > 0 {
                state.threads += threads;
                return News { overdue, threads, ended: state.ended };
            }
            // What became due goes to whoever is idle.
            (0..state.queued.len().min(state.idle())).for_each(|_| self.work.notify_one());
            let until = state.next_event(now).map(|at| at.saturating_duration_since(now));
            state = match until {
                Some(timeout) => self.news.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0,
                None => self.news.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// The engine takes nothing new.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.work.notify_all();
        self.news.notify_all();
    }
}

/// What no thread has begun.
fn drain(state: &mut State) -> Vec<Pending> {
    let mut rest: Vec<_> = std::mem::take(&mut state.queued).into();
    rest.extend(std::mem::take(&mut state.later).into_iter().map(|(_, open)| open));
    rest
}

#[cfg(test)]
mod tests {
    use super::super::fds::Budget;
    use super::*;
    use crate::front::{Answer, ObjectId, Outcome, Ticket};
    use std::sync::Arc;

    struct Nobody;

    impl Answer for Nobody {
        fn answer(&self, _: u64, _: Outcome) -> std::io::Result<bool> {
            Ok(true)
        }
    }

    /// It takes its open some time after it was wanted, and who watches looks again at once.
    #[test]
    fn a_thread_that_is_about_to_start_is_not_started_twice() {
        let (opens, budget) = (Opens::new(Duration::from_millis(300)), Budget::new(100, false));
        let push = |token| {
            let ticket = Ticket::new(Arc::new(Nobody) as Arc<dyn Answer>, token);
            let sink = Arc::new(tempfile::tempfile().unwrap());
            let open = OpenRequest { object: ObjectId(1), key: Key::new(b"dom", b"blob"), ticket, sink };
            opens.push(open, budget.charge_open()).unwrap();
        };
        push(1);
        push(2);
        assert_eq!(opens.watch().threads, 2);
        push(3);
        assert_eq!(opens.watch().threads, 1);
        let (place, _) = opens.take().unwrap();
        let taken = opens.give_back(place).unwrap();
        opens.ready();
        // Two are left for three threads; the next things that happen are that they have had their time.
        let mut ended = vec![taken];
        while ended.len() < 3 {
            let News { threads, overdue, .. } = opens.watch();
            assert_eq!(threads, 0);
            ended.extend(overdue);
        }
        for pending in ended {
            pending.open.ticket.answer(Outcome::Done).unwrap();
        }
    }
}
