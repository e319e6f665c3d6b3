// SPDX-License-Identifier: Apache-2.0

package main

import "syscall"

// endWithParent has the kernel end the process when the demo is gone, however it went.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGTERM }
