//! How long answers wait for each other.

use super::*;
use crate::engine::batch::ANSWER_WAIT_MAX_US;
use crate::store::{Data, Extent};

/// A demand and its window.
const STEP_BYTES: u64 = 65536;
/// Demands between two that can be answered at once.
const BETWEEN: u64 = 3;
const ROUNDS: u64 = 20;

/// A blob of zeros that takes long to say so. It counts the demands that it was asked about.
#[derive(Debug, Default)]
struct Slow {
    taken: Arc<AtomicU64>,
}

impl Blob for Slow {
    fn len_bytes(&self) -> u64 {
        ROUNDS * BETWEEN * STEP_BYTES
    }

    fn extent(&self, offset: u64) -> Extent {
        std::thread::sleep(Duration::from_micros(10 * ANSWER_WAIT_MAX_US));
        self.taken.fetch_max(offset / STEP_BYTES + 1, Ordering::Relaxed);
        Extent { len_bytes: self.len_bytes() - offset, data: Data::Zero }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &[]
    }
}

#[derive(Debug)]
struct SlowStore(Arc<Slow>);

impl Store for SlowStore {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn open(&self, _: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        Ok(Some(Arc::clone(&self.0) as Arc<dyn Blob>))
    }
}

/// Notes how many slow demands were taken before each answer.
struct Watcher {
    taken: Arc<AtomicU64>,
    seen: Mutex<Vec<(u64, u64)>>,
}

impl Answer for Watcher {
    fn answer(&self, round: u64, _: Outcome) -> std::io::Result<bool> {
        self.seen.lock().unwrap().push((round, self.taken.load(Ordering::Relaxed)));
        Ok(true)
    }
}

#[test]
fn a_reader_whose_bytes_are_there_does_not_wait_for_the_rest_of_a_long_turn() {
    for kind in [EngineKind::Uring, EngineKind::Blocking] {
        let (kernel, slow) = (Kernel::new(), Arc::new(Slow::default()));
        let watcher = Arc::new(Watcher { taken: Arc::clone(&slow.taken), seen: Mutex::default() });
        let (front, store) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, Arc::new(SlowStore(slow)) as Arc<dyn Store>);
        let engine = match Engine::start(&front, &store, &settings(kind, 1)) {
            Err(EngineError::NoRing(why)) => return eprintln!("not run: {why}"),
            engine => engine.unwrap(),
        };
        let (_file, fd) = sink();
        let mut steps = vec![kernel.open(1000, 8, &fd), Step::Await(1000)];
        for round in 0..ROUNDS {
            // Of nothing, so it can be answered at once.
            let ticket = Ticket::new(Arc::clone(&watcher) as Arc<dyn Answer>, round);
            steps.push(Step::Ask(Request::Need(NeedRequest { object: ObjectId(8), range: 0..0, ticket })));
            let demands = (round * BETWEEN..(round + 1) * BETWEEN).map(|n| kernel.need(n, 8, n * STEP_BYTES..n * STEP_BYTES + 4096));
            steps.extend(demands);
        }
        kernel.then(steps);
        wait_until(|| watcher.seen.lock().unwrap().len() as u64 == ROUNDS);
        for (round, taken) in &*watcher.seen.lock().unwrap() {
            // The step that is under way when the time is over ends; no other one begins.
            assert!(*taken <= round * BETWEEN + 1, "answer {round} waited for {} demands", taken - round * BETWEEN);
        }
        (0..ROUNDS * BETWEEN).for_each(|n| assert_eq!(kernel.answers.of(n), Outcome::Done));
        let batches: u64 = engine.stop(PATIENCE, || false).unwrap().answer_batches.iter().sum();
        assert!(batches > 0);
    }
}
