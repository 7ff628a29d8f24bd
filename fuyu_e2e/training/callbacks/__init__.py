"""What watches, reports and guards a run, each a Lightning callback."""
