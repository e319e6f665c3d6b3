// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/baton-epp/baton/app"
)

func newCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE...",
		Short: "Read configurations as serve would; print the resolved form or every error",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			var errs []error
			for _, file := range files {
				resolved, warnings, err := app.Check(file)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				for _, w := range warnings {
					if _, err := fmt.Fprintln(cmd.ErrOrStderr(), "warning: "+w); err != nil {
						return err
					}
				}
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "# %s\n%s", file, resolved); err != nil {
					return err
				}
			}
			return errors.Join(errs...)
		},
	}
}
