// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime"
	"syscall"
)

// endWithParent has the kernel end the process when the bench is gone, however it went.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }

// otherCores names every core but the first, as taskset takes them; the first where it is alone.
func otherCores() string {
	if n := runtime.NumCPU(); n > 1 {
		return fmt.Sprintf("1-%d", n-1)
	}
	return "0"
}
