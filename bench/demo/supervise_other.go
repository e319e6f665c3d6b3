// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package main

import "syscall"

// endWithParent does nothing where the kernel has no such service: a demo that is killed leaves its processes.
func endWithParent(*syscall.SysProcAttr) {}
