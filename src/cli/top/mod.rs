//! `infill top`: what the daemon does, live.

mod sample;
mod screen;

use std::io::{self, Write, stdin};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use clap::Args;
use console::Term;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

use self::sample::{Interval, Sample};
use self::screen::{COLUMNS, ROWS, lines};
use super::Failure;
use super::place::Asking;
use crate::ops::exit;
use crate::ops::signals::{Event, Signals};

/// Show live what the daemon does: requests, latency, blobs that miss, descriptors, shards, slow sources
///
/// q or Ctrl-C ends it. Where standard output is no terminal, each picture follows the last one.
///
/// Exit code: 0, 69 if no daemon serves, 77 if this user is not permitted, 1 for anything else.
#[derive(Debug, Args)]
pub struct TopArgs {
    #[command(flatten)]
    asking: Asking,
    /// Seconds between two pictures
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// End after so many pictures
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.1..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("must be 0.1 to 3600".to_owned()) }
}

/// Shows it until somebody has seen enough.
///
/// # Errors
/// The daemon does not answer.
pub fn run(args: &TopArgs) -> Result<(), Failure> {
    let daemon = args.asking.client()?;
    let signals = Signals::block().map_err(|error| Failure::new(exit::FAILED, format!("cannot receive signals: {error}")))?;
    let screen = Screen::begin();
    let look = || {
        let told = |error| {
            Failure::new(exit::FAILED, format!("the daemon told something else than infill {} expects: {error}", env!("CARGO_PKG_VERSION")))
        };
        Ok::<_, Failure>((Sample::of(daemon.stat()?).map_err(told)?, Instant::now()))
    };
    let (mut before, mut since) = look()?;
    let mut left = args.count;
    while left != Some(0) && screen.goes_on(&signals, Duration::from_secs_f64(args.interval)) {
        let (now, at) = look()?;
        let (columns, rows) = screen.size();
        let picture = lines(&Interval { before: &before, now: &now, seconds: (at - since).as_secs_f64() }, columns, rows);
        if screen.draw(&picture).is_err() {
            // Whoever looked (a pager, head, a terminal) went away.
            break;
        }
        (before, since) = (now, at);
        left = left.map(|left| left - 1);
    }
    Ok(())
}

/// Where pictures are shown. A terminal looks as it did before when this is dropped.
struct Screen {
    term: Term,
    /// What its keys did.
    before: Option<Termios>,
}

impl Screen {
    /// A terminal then tells of each key at once, and shows none.
    fn begin() -> Self {
        let term = Term::stdout();
        let before = term.is_term().then(|| tcgetattr(stdin()).ok()).flatten();
        if let Some(before) = &before {
            let mut keys = before.clone();
            keys.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, &keys);
            let _ = term.clear_screen();
            let _ = term.hide_cursor();
        }
        Self { term, before }
    }

    /// Columns and rows.
    fn size(&self) -> (usize, usize) {
        let size = self.before.as_ref().and_then(|_| self.term.size_checked());
        size.map_or((COLUMNS, ROWS), |(rows, columns)| (columns.into(), rows.into()))
    }

    /// Over the last picture, or after it.
    fn draw(&self, lines: &[String]) -> io::Result<()> {
        let mut term = &self.term;
        if self.before.is_none() {
            return writeln!(term, "{}\n", lines.join("\n"));
        }
        term.move_cursor_to(0, 0)?;
        for (n, line) in lines.iter().enumerate() {
            term.clear_line()?;
            let end = if n + 1 < lines.len() { "\n" } else { "" };
            write!(term, "{line}{end}")?;
        }
        term.clear_to_end_of_screen()
    }

    /// Waits for the next picture; `false`: somebody has seen enough.
    fn goes_on(&self, signals: &Signals, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let keyboard = stdin();
            let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            fds.extend(self.before.as_ref().map(|_| PollFd::new(keyboard.as_fd(), PollFlags::POLLIN)));
            // Rounded up, so that it does not look again and again in the last millisecond.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut fds, timeout);
            let [stopped, pressed] = [0, 1].map(|n| fds.get(n).is_some_and(|fd| fd.any().unwrap_or(false)));
            // A terminal that hangs up says so by the signal that has a daemon read its settings.
            let is_told_to = stopped && matches!(signals.next(), Some(Event::Stop | Event::Reload));
            if is_told_to || pressed && is_quit() {
                return false;
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, before);
            let _ = self.term.show_cursor();
            let _ = self.term.write_line("");
        }
    }
}

/// Whether the key that was pressed ends it; so does a keyboard that is gone.
fn is_quit() -> bool {
    let mut keys = [0; 16];
    match nix::unistd::read(stdin(), &mut keys) {
        Ok(0) | Err(_) => true,
        Ok(len) => keys[..len].iter().any(|key| b"qQ\x1b".contains(key)),
    }
}
