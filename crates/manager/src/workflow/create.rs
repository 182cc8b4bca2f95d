//! Stub.
super::stub! { CreateVm VmCreate }
