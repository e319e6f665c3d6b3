package metricsscraper

import (
	"context"

	"github.com/baton-epp/baton/pool"
)

// CONTRACT stub so that app compiles; the scraper engineer replaces this file.

type Scraper struct{}

func (s *Scraper) Sync(*pool.Snapshot)           {}
func (s *Scraper) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
