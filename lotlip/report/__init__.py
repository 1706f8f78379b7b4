"""Stage `report`: one page with every table and figure."""
