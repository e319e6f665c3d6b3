// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package main

import "syscall"

// endWithParent does nothing where the kernel has no such service; CPU times are read from /proc, so only Linux counts.
func endWithParent(*syscall.SysProcAttr) {}

func otherCores() string { return "0" }
