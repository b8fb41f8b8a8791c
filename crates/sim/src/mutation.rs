//! Deliberate mistakes, to prove that the checks find them.
//!
//! None of them is in fleet's own code, which has no switch for that: each is made where that code meets the world around it,
//! and has the effect that the mistake inside would have. A store that takes a transaction without looking at one of its
//! conditions is a fleetd that did not set it.

/// A deliberate mistake.
///
/// That the renewal of a lease that has ended counts is not among them: a session renews only what its view still has, so it is harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// What the engine and users write is not guarded by the revision of the unit.
    NoUnitGuard,
    /// What the engine wrote earlier in its term, and is still on its way, is not kept away from what it decides anew.
    NoFence,
    /// What the engine writes is not guarded by its term.
    NoTermGuard,
    /// A lost machine need not be away any more when its unit is placed elsewhere.
    NoAbsenceGuard,
    /// What a session writes of a machine is not guarded by its being the newest.
    NoSessionGuard,
    /// A server misses one of many changes.
    LostChange,
    /// A server takes an empty listing of the registry for the truth.
    EmptyListing,
    /// An agent is told, when its session begins, that nothing is wanted.
    EmptySnapshot,
    /// A restarted fleetd does not know what was started before.
    ForgottenMarks,
    /// It is not noted before a stop that the unit may have stopped by fleet's doing.
    UnnotedStop,
    /// A stop counts as done while the unit still runs.
    HastyStop,
    /// A write is acknowledged though its outcome is not known.
    UnknownIsDone,
    /// What was acknowledged a moment ago is gone after a restart of the store.
    LostWrites,
    /// A machine is given up before its TTL is over.
    EarlyExpiry,
    /// A sign of life is answered before the registry has it.
    EarlyAnswer,
    /// An agent, and its guard, do not notice that they could not renew for long.
    NoFencing,
    /// The guard does nothing, whatever becomes of fleetd.
    NoGuard,
    /// systemd's configuration is reloaded for each unit that is installed.
    ReloadPerUnit,
    /// A record that can't be read counts as one that is gone.
    UnreadableIsGone,
    /// Who changes a record leaves out the fields that it does not know.
    UnknownFieldsLost,
    /// A machine says that nothing of a unit runs any more as soon as it is asked.
    EarlyRelease,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Mutation; 21] = [
        Mutation::NoUnitGuard,
        Mutation::NoFence,
        Mutation::NoTermGuard,
        Mutation::NoAbsenceGuard,
        Mutation::NoSessionGuard,
        Mutation::LostChange,
        Mutation::EmptyListing,
        Mutation::EmptySnapshot,
        Mutation::ForgottenMarks,
        Mutation::UnnotedStop,
        Mutation::HastyStop,
        Mutation::UnknownIsDone,
        Mutation::LostWrites,
        Mutation::EarlyExpiry,
        Mutation::EarlyAnswer,
        Mutation::NoFencing,
        Mutation::NoGuard,
        Mutation::ReloadPerUnit,
        Mutation::UnreadableIsGone,
        Mutation::UnknownFieldsLost,
        Mutation::EarlyRelease,
    ];
}
