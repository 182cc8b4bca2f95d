//! Stub.
super::stub! { StartVm VmStart ShutdownVm VmShutdown StopVm VmStop RestartVm VmRestart PauseVm VmPause ResumeVm VmResume }

/// How long a guest may take to power down when nobody says, in seconds. Shorter: busy guests fail to. Longer: whoever
/// waits for a guest that ignores the button waits long.
pub const SHUTDOWN_TIMEOUT_S: u32 = 120;
