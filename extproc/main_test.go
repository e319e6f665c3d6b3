// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"os"
	"testing"

	"github.com/baton-epp/baton/internal/leaktest"
)

// TestMain fails the package when goroutines outlive its tests.
func TestMain(m *testing.M) { os.Exit(leaktest.Run(m)) }
