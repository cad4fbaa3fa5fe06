//! Replies: many short writes in one call. Each completes in that call, because nothing that is replied to ever waits.

use std::io;

use io_uring::{opcode, squeue, types};
use nix::errno::Errno;

use super::{REPLIES, Ring};
use crate::engine::io::REPLIES_MAX;
use crate::front::{REPLY_BYTES, Reply};

/// Result of a reply that has none yet.
const PENDING: i32 = i32::MIN;

/// The replies that are being written.
#[derive(Debug)]
pub(super) struct Replies {
    /// Their bytes, at an address that does not change; used again only when all of them have completed.
    memory: Box<[[u8; REPLY_BYTES]; REPLIES_MAX]>,
    results: [i32; REPLIES_MAX],
    pending: usize,
}

impl Default for Replies {
    fn default() -> Self {
        Self { memory: Box::new([[0; REPLY_BYTES]; REPLIES_MAX]), results: [PENDING; REPLIES_MAX], pending: 0 }
    }
}

impl Replies {
    /// The reply in this place has completed.
    pub(super) fn ended(&mut self, place: u64, result: i32) {
        if let Some(slot) = usize::try_from(place).ok().and_then(|place| self.results.get_mut(place)) {
            *slot = result;
            self.pending -= 1;
        }
    }
}

impl Ring {
    /// Writes all of them and waits for their results. What else completes meanwhile is told of by the next wait.
    pub(super) fn write_replies(&mut self, replies: &[Reply], results: &mut Vec<i32>) {
        assert!(replies.len() <= REPLIES_MAX, "more replies than their memory holds");
        results.clear();
        if self.replies.pending > 0 {
            // The ring has failed before; those are the kernel's still.
            return results.resize(replies.len(), -(Errno::EIO as i32));
        }
        for (place, reply) in replies.iter().enumerate() {
            self.replies.memory[place] = reply.bytes;
            self.replies.results[place] = PENDING;
            let entry = self.reply_entry(place, reply);
            self.submit(entry.user_data(REPLIES + place as u64));
        }
        self.replies.pending = replies.len();
        let failed = self.finish_replies().err();
        let errno = failed.map_or(0, |error| -error.raw_os_error().unwrap_or(Errno::EIO as i32));
        results.extend(self.replies.results[..replies.len()].iter().map(|&result| if result == PENDING { errno } else { result }));
    }

    fn reply_entry(&self, place: usize, reply: &Reply) -> squeue::Entry {
        let (memory, len) = (self.replies.memory[place].as_ptr(), REPLY_BYTES as u32);
        match self.requests.iter().find(|file| file.fd == reply.to).and_then(|file| file.slot) {
            Some(slot) => opcode::Write::new(types::Fixed(slot), memory, len).build(),
            None => opcode::Write::new(types::Fd(reply.to), memory, len).build(),
        }
    }

    fn finish_replies(&mut self) -> io::Result<()> {
        let (mut early, mut ready) = (std::mem::take(&mut self.early), self.early_ready);
        let mut entered = Ok(());
        while self.replies.pending > 0 && entered.is_ok() {
            self.flush_backlog();
            // What has no room in the queue yet cannot be waited for.
            let want = if self.backlog.is_empty() { self.replies.pending } else { 0 };
            entered = self.enter(want, None);
            self.reap(&mut early, &mut ready);
        }
        (self.early, self.early_ready) = (early, ready);
        entered
    }
}
