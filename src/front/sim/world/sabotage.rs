//! Mistakes made on purpose, to see that the checks find them.

/// A mistake between the machine and the world.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sabotage {
    /// A request is answered "done" as soon as it comes.
    DoneTooEarly,
    /// An answer is not given.
    DropAnswer,
    /// An answer is given twice.
    AnswerTwice,
    /// A failure is made up.
    FailForNothing,
    /// A write starts half a page late.
    MisalignedWrite,
    /// A write goes to the next page.
    WrongPlace,
    /// The padding behind the blob's end is not zeroed.
    NoPadding,
    /// A read fetches the bytes one sector further on.
    WrongSource,
    /// Every operation uses slot 0.
    OneSlotForAll,
    /// A short write is taken for a whole one.
    ShortIsWhole,
    /// A sink is dropped at once when its object is closed.
    EarlyRelease,
    /// A sink is never dropped.
    NoRelease,
    /// An operation is forgotten, never to be reported done.
    LostOperation,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::DoneTooEarly,
        Self::DropAnswer,
        Self::AnswerTwice,
        Self::FailForNothing,
        Self::MisalignedWrite,
        Self::WrongPlace,
        Self::NoPadding,
        Self::WrongSource,
        Self::OneSlotForAll,
        Self::ShortIsWhole,
        Self::EarlyRelease,
        Self::NoRelease,
        Self::LostOperation,
    ];
}
