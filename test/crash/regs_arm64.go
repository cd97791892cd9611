package crash

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The register sets of elf.h: the call's number has one of its own.
const (
	ntPrStatus      = 1
	ntARMSystemCall = 0x404
)

// skipCall keeps the kernel from carrying out the call that a thread enters.
func skipCall(tid int) error {
	none := int32(-1)
	v := unix.Iovec{Base: (*byte)(unsafe.Pointer(&none))}
	v.SetLen(4)
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SETREGSET, uintptr(tid), ntARMSystemCall, uintptr(unsafe.Pointer(&v)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// setResult sets what the call that a thread leaves has returned.
func setResult(tid int, result int64) error {
	var r unix.PtraceRegsArm64
	if err := unix.PtraceGetRegSetArm64(tid, ntPrStatus, &r); err != nil {
		return err
	}
	r.Regs[0] = uint64(result)
	return unix.PtraceSetRegSetArm64(tid, ntPrStatus, &r)
}
